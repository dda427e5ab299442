"""Sampling: Transformers' processors row by row are the reference, and no row sees another."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from mor.serving.requests import SamplingParams
from mor.serving.sampling import Sampled, Sampler, token_logprobs
from mor.serving.sampling_state import SamplingState, uniform

V = 97

params_strategy = st.builds(
    SamplingParams,
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1e-6, 1e-3, 0.5, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, V, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 0.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=3),
    logprobs=st.sampled_from([None, 0, 1, 5]),
    seed=st.integers(0, 2**32),
)


def make_state(params: SamplingParams, prompt: list[int], output: list[int]) -> SamplingState:
    state = SamplingState(params, prompt, seed=params.seed or 0, index=1, ends=[2])
    for token in output:
        state.accept(token)
    return state


def logits_of(seed: int, rows: int = 1, width: int = V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * 3


def reference_scores(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """Scores `[1, V]` after Transformers' processors, in float64."""
    ids = torch.tensor([prompt + output])
    scores = logits.double()
    processors = hf.LogitsProcessorList()
    if params.logit_bias:
        processors.append(
            hf.SequenceBiasLogitsProcessor({(k,): float(b) for k, b in params.logit_bias.items()})
        )
    if params.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    scores = processors(ids, scores)
    # OpenAI's two penalties, which Transformers does not have.
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=V)
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    warpers = hf.LogitsProcessorList()
    warpers.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, [2]))
    if not params.greedy:
        warpers.append(hf.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            warpers.append(hf.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(hf.TopPLogitsWarper(params.top_p))
        if params.min_p:
            warpers.append(hf.MinPLogitsWarper(params.min_p))
    return warpers(ids, scores)


@settings(max_examples=400, deadline=None)
@given(
    params=params_strategy,
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, V - 1), max_size=6),
    seed=st.integers(0, 10**6),
)
def test_a_row_is_drawn_from_transformers_distribution(params, prompt, output, seed):
    logits = logits_of(seed)
    state = make_state(params, prompt, output)
    token = Sampler(V)(logits, [state])[0].token_id
    scores = reference_scores(logits, params, prompt, output)
    if params.greedy:
        assert scores[0, token] > scores.max() - 1e-5
        return
    # The same number, through the reference's cumulative distribution. A mass within rounding of
    # top-p or min-p makes two sets right; the token then need only be in the larger.
    cumulative = scores.softmax(-1).cumsum(-1)[0]
    target = state.uniform()
    low = cumulative[token - 1].item() if token else 0.0
    if not low - 1e-5 <= target <= cumulative[token].item() + 1e-5:
        assert kept_differs(logits, params, prompt, output)


def kept_differs(logits, params, prompt, output) -> bool:
    """Whether top-p or min-p a little smaller or larger keeps other tokens."""
    kept = set()
    for shift in (-1e-5, 1e-5):
        moved = SamplingParams(
            **{
                **{name: getattr(params, name) for name in SamplingParams.__dataclass_fields__},
                "top_p": min(1.0, max(0.0, params.top_p + shift)) if params.top_p < 1 else 1.0,
                "min_p": min(1.0, max(0.0, params.min_p * (1 + shift))),
            }
        )
        finite = reference_scores(logits, moved, prompt, output)[0].isfinite()
        kept.add(tuple(finite.nonzero()[:, 0].tolist()))
    return len(kept) > 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(params_strategy, st.lists(st.integers(0, V - 1), min_size=1, max_size=4)),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 10**6),
    padding=st.sampled_from([0, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_row_alone_and_in_a_batch_bit_for_bit(rows, seed, padding, dtype):
    logits = logits_of(seed, len(rows), V + padding).to(dtype)
    states = [make_state(params, prompt, [3, 3, 4]) for params, prompt in rows]
    together = Sampler(V)(logits, states)
    for row, state in enumerate(states):
        assert Sampler(V)(logits[row : row + 1], [state]) == [together[row]]
    backwards = Sampler(V)(logits.flip(0), states[::-1])
    assert backwards == together[::-1]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_vocabulary_alone_and_in_a_batch_bit_for_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = logits_of(5, 12, 49_152)
        # A flat row has more than 2,048 candidates.
        logits[3:6] /= 30
        states = [
            SamplingState(
                SamplingParams(top_p=0.9 if row % 2 else 1.0, top_k=row % 3 * 40, logprobs=row % 4),
                [1],
                seed=row,
            )
            for row in range(12)
        ]
        together = Sampler(49_152)(logits, states)
        alone = [Sampler(49_152)(logits[row : row + 1], states[row : row + 1]) for row in range(12)]
        assert [row for [row] in alone] == together
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("top_k", [0, 40])
def test_candidates_do_not_change_what_all_tokens_give(monkeypatch, top_k):
    logits = logits_of(1, 20, 5000)
    logits[10:] = (logits[10:] * 2).round() / 2  # ties
    states = [
        SamplingState(SamplingParams(top_p=0.8, top_k=top_k), [1], seed=row) for row in range(20)
    ]
    few = Sampler(5000)(logits, states)
    monkeypatch.setattr("mor.serving.sampling._CANDIDATES", ())
    assert Sampler(5000)(logits, states) == few


@pytest.mark.parametrize("vocab_size", [2049, 4096, 5000])
def test_a_large_row_is_drawn_from_its_cumulative_distribution(vocab_size):
    rows = 2000
    logits = logits_of(11, 1, vocab_size).expand(rows, vocab_size)
    params = SamplingParams(min_p=0.001)
    states = [SamplingState(params, [1], seed=seed) for seed in range(rows)]
    tokens = [sampled.token_id for sampled in Sampler(vocab_size)(logits, states)]
    probabilities = logits[0].double().softmax(-1)
    probabilities[probabilities < 0.001 * probabilities.max()] = 0
    cumulative = (probabilities / probabilities.sum()).cumsum(-1)
    drawn = torch.tensor([state.uniform() for state in states])
    above = cumulative[tokens]
    assert (probabilities[tokens] > 0).all()
    assert (drawn <= above + 1e-6).all()
    assert (drawn >= above - (probabilities / probabilities.sum())[tokens] - 1e-6).all()


def test_the_sampled_tokens_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rows = 20_000
    states = [SamplingState(SamplingParams(), [1], seed=seed) for seed in range(rows)]
    tokens = [s.token_id for s in Sampler(4)(logits.expand(rows, 4), states)]
    observed = np.bincount(tokens, minlength=4) / rows
    expected = logits.softmax(-1)[0].numpy()
    assert np.abs(observed - expected).max() < 0.015


def test_ties_go_to_the_smaller_token():
    state = SamplingState(SamplingParams(temperature=0), [1])
    assert Sampler(4)(torch.tensor([[1.0, 5.0, 5.0, 5.0]]), [state])[0].token_id == 1


def test_trap_17_logprobs_are_of_raw_logits():
    logits = logits_of(3)
    params = SamplingParams(temperature=0.1, logit_bias={7: 50.0}, logprobs=3, seed=0)
    sampled = Sampler(V)(logits, [make_state(params, [7], [7])])[0]
    assert sampled.token_id == 7
    expected = logits.log_softmax(-1)[0]
    assert sampled.logprobs.logprob == pytest.approx(expected[7].item(), abs=1e-5)
    assert sampled.logprobs.rank == (expected > expected[7]).sum() + 1
    assert [i for i, _ in sampled.logprobs.top] == expected.topk(3).indices.tolist()


def test_trap_17_a_greedy_token_has_the_float_of_the_top_entry():
    rows = token_logprobs(logits_of(4, 50), logits_of(4, 50).argmax(-1).tolist(), [5] * 50)
    assert all(row.logprob is row.top[0][1] and row.rank == 1 for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-5, 1e-3])
def test_trap_18_a_tiny_temperature_is_greedy(temperature):
    logits = logits_of(5, 8) * 1000
    states = [SamplingState(SamplingParams(temperature=temperature), [1], seed=s) for s in range(8)]
    tokens = [sampled.token_id for sampled in Sampler(V)(logits, states)]
    assert tokens == logits.argmax(-1).tolist()


def test_trap_19_seeds_are_counters_and_no_global_generator():
    logits = logits_of(6)
    before = torch.random.get_rng_state().clone()
    state = SamplingState(SamplingParams(), [1], seed=9)
    tokens = []
    for _ in range(20):
        torch.rand(3)
        tokens.append(Sampler(V)(logits, [state])[0].token_id)
        state.accept(tokens[-1])
    torch.random.set_rng_state(before)
    again = SamplingState(SamplingParams(), [1], seed=9)
    for token in tokens:
        assert Sampler(V)(logits, [again])[0].token_id == token
        again.accept(token)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(tokens)) > 3


def test_trap_6_continuations_have_seeds_of_their_own():
    assert len({uniform(1, child, place) for child in range(50) for place in range(50)}) == 2500
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


def test_uniform_is_uniform():
    values = np.array([uniform(seed, 0, place) for seed in range(100) for place in range(100)])
    assert 0 <= values.min()
    assert values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 1000).max() < 150
    for value in (0.3, 0.999, 1.0, 1.7, 2.0):
        assert (1 - 2.0**-52) * value < value


@settings(max_examples=50, deadline=None)
@given(params=params_strategy, seed=st.integers(0, 1000))
def test_trap_20_padding_is_never_sampled(params, seed):
    logits = logits_of(seed, 1, V + 31)
    logits[:, V:] = 1e4
    sampled = Sampler(V)(logits, [make_state(params, [1], [])])[0]
    assert 0 <= sampled.token_id < V
    if sampled.logprobs is not None:
        assert all(token < V for token, _ in sampled.logprobs.top)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trap_22_bad_logits_fail_their_row_only(value):
    logits = logits_of(8, 4)
    states = [
        make_state(SamplingParams(temperature=t, logprobs=1, top_p=0.9), [1], [])
        for t in (0, 1, 0, 1)
    ]
    good = Sampler(V)(logits, states)
    logits[1, 5] = logits[2, 0] = value
    mixed = Sampler(V)(logits, states)
    assert mixed[0] == good[0]
    assert mixed[3] == good[3]
    for row in (1, 2):
        assert mixed[row].token_id == -1
        assert str(value) in mixed[row].error


def test_a_processor_that_raises_fails_its_row_only():
    def broken(ids, scores):
        raise KeyError("no")

    def wrong_shape(ids, scores):
        return scores[:, :3]

    def nothing(ids, scores):
        return torch.full_like(scores, -math.inf)

    states = [
        SamplingState(SamplingParams(logits_processors=[p]), [1], seed=1)
        for p in (broken, wrong_shape, nothing)
    ] + [SamplingState(SamplingParams(), [1], seed=1)]
    logits = logits_of(9, 4)
    sampled = Sampler(V)(logits, states)
    assert "KeyError" in sampled[0].error
    assert "[1, 97]" in sampled[1].error
    assert sampled[2].error == "no token is allowed"
    assert sampled[3] == Sampler(V)(logits[3:], states[3:])[0]


def test_processors_of_transformers_work_row_by_row():
    seen = []

    def spy(ids, scores):
        seen.append(ids.tolist())
        return scores

    processors = [hf.NoBadWordsLogitsProcessor([[5]], eos_token_id=2), spy]
    state = SamplingState(SamplingParams(temperature=0, logits_processors=processors), [1, 2])
    state.accept(3)
    logits = torch.zeros(1, V)
    logits[0, 5], logits[0, 6] = 9, 8
    before = logits.clone()
    assert Sampler(V)(logits, [state])[0].token_id == 6
    assert seen == [[[1, 2, 3]]]
    assert torch.equal(logits, before)


def test_ends_are_forbidden_before_min_tokens():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[4])
    state = SamplingState(params, [1], ends=[2])
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 4], logits[0, 9] = 9, 8, 7
    tokens = []
    for _ in range(3):
        tokens.append(Sampler(V)(logits, [state])[0].token_id)
        state.accept(tokens[-1])
    assert tokens == [9, 9, 2]


def test_no_rows_and_wrong_shapes():
    assert Sampler(V)(torch.zeros(0, V), []) == []
    for logits in (torch.zeros(2, V), torch.zeros(V), torch.zeros(1, V - 1)):
        with pytest.raises(ValueError, match=r"expected logits \[1, V\]"):
            Sampler(V)(logits, [SamplingState(SamplingParams(), [1])])
    assert Sampled(3) == Sampled(3, None, None)
