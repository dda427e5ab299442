"""Tokens and depths of the engine are those of `generate` alone, whatever else it runs."""

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mor.serving import Engine, RequestError, SamplingParams

from ..models.conftest import VARIANTS, small_llama, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWED = {"router": "expert", "kv_strategy": "recursion"}
RELAXED = {"relaxation": "lora", "relaxation_rank": 2}


class PoisonedEngine(Engine):
    def _prepare_blocks(self, plan):
        super()._prepare_blocks(plan)
        self.pool.data[torch.from_numpy(plan.fresh_blocks)] = torch.nan


def engine_of(model, **options):
    """A small engine whose fresh blocks hold NaN."""
    options = {"kv_memory": "1MiB", "block_size": 4, "policy": 0.5, **options}
    return PoisonedEngine(model, **options)


def greedy(count=8, **options):
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **options)


def alone(model, prompt, count):
    """Tokens of `generate`, and the depths of the rows that predicted them."""
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=None)[0]
    with torch.no_grad():
        output = model(out[None], use_cache=False)
    depths = getattr(output, "token_depths", None)
    new = out[len(prompt) :].tolist()
    return new, () if depths is None else tuple(depths[0, len(prompt) - 1 : -1].tolist())


def some_prompts(seed, count=5, longest=14):
    draw = random.Random(seed)
    return [[draw.randrange(3, 97) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def check_against_alone(model, prompts, outputs, counts):
    for prompt, output, count in zip(prompts, outputs, counts, strict=True):
        tokens, depths = alone(model, prompt, count)
        assert list(output.token_ids) == tokens
        assert output.depths == depths
        assert output.finish_reason == "length"
        assert output.usage.prompt_tokens == len(prompt)
        assert output.usage.completion_tokens == count


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("policy", ["lock-step", 0.0, 0.5])
def test_every_kind_of_model_equals_generate_alone(name, policy):
    model, prompts = small_model(**VARIANTS[name]).double().eval(), some_prompts(0)
    engine = engine_of(model, policy=policy, chunk=3)
    outputs = engine.generate(prompts, greedy())
    engine.check()
    check_against_alone(model, prompts, outputs, [8] * len(prompts))


@pytest.mark.parametrize("kind", ["llama", "relaxed"])
def test_dense_and_relaxed_models_equal_generate_alone(kind):
    model = small_llama() if kind == "llama" else small_model(**RELAXED)
    model, prompts = model.double().eval(), some_prompts(1)
    engine = engine_of(model, policy="auto")
    outputs = engine.generate(prompts, greedy())
    engine.check()
    check_against_alone(model, prompts, outputs, [8] * len(prompts))


@pytest.mark.parametrize("kind", ["llama", "mor"])
def test_both_curves_are_measured_as_far_as_rows_can_come(kind):
    model = small_llama() if kind == "llama" else small_model(**WINDOWED)
    engine = engine_of(model.eval(), policy="auto", max_rows=6, chunk=16)
    rows = {name: [count for count, _ in curve] for name, curve in engine.curves.items()}
    assert rows == {"block": [1, 2, 4, 6, 8, 16], "ends": [1, 2, 4, 6]}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_arrivals_scarce_blocks_and_aborts(data):
    """Requests come and leave at any pass, preempt each other, share prefixes; none is changed."""
    name = data.draw(st.sampled_from(sorted(VARIANTS)))
    model = small_model(**VARIANTS[name]).double().eval()
    draw = random.Random(data.draw(st.integers(0, 2**16)))
    engine = engine_of(model, chunk=draw.choice([1, 3, 32]), policy=draw.choice([0, 0.4, 1.0]))
    blocks = draw.randint(40, 60)  # enough for one request, not for all
    engine = engine_of(
        model,
        kv_memory=blocks * engine.pool.block_bytes,
        chunk=draw.choice([1, 3, 32]),
        policy=draw.choice(["lock-step", 0.0, 0.4]),
        max_rows=draw.choice([2, 8]),
    )
    common = some_prompts(draw.random(), 1, 9)[0]
    prompts = [p if draw.random() < 0.5 else common + p for p in some_prompts(draw.random(), 9)]
    counts = [draw.randint(1, 9) for _ in prompts]
    left, ids, found, aborted = list(range(len(prompts))), {}, {}, set()
    while left or engine.has_work:
        while left and draw.random() < 0.5:
            place = left.pop()
            ids[engine.add(prompts[place], greedy(counts[place]))] = place
        if ids and draw.random() < 0.05:
            id = draw.choice(list(ids))
            if engine.abort(id):
                aborted.add(ids[id])
        for delta in engine.step():
            found.setdefault(ids[delta.request_id], []).extend(delta.token_ids)
    engine.check()
    for place, prompt in enumerate(prompts):
        tokens, _ = alone(model, prompt, counts[place])
        if place in aborted:
            assert tokens[: len(found.get(place, []))] == found.get(place, [])
        else:
            assert found[place] == tokens


def test_a_common_prefix_is_computed_once():
    model = small_model().double().eval()
    engine = engine_of(model)
    prompt = some_prompts(2, 1, 30)[0] + list(range(3, 33))
    first, second = (engine.generate([prompt], greedy())[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= len(prompt) - 5
    engine.check()


def test_several_continuations_of_one_prompt():
    model = small_model().double().eval()
    engine, prompt = engine_of(model), some_prompts(3, 1)[0]
    params = SamplingParams(max_tokens=6, n=3, seed=7, ignore_eos=True)
    together = engine.generate([prompt], params)
    assert [output.index for output in together] == [0, 1, 2]
    assert len({output.token_ids for output in together}) > 1
    beside = engine_of(model).generate([*some_prompts(4), prompt], [greedy()] * 5 + [params])
    assert [output.token_ids for output in together] == [o.token_ids for o in beside[5:]]
    engine.check()


@pytest.mark.parametrize("router", ["expert", "token"])
def test_a_bound_of_recursions_holds_for_its_request_alone(router):
    model = small_model(router=router, capacities=None, router_alpha=1.0).double().eval()
    prompts = some_prompts(5)
    free = engine_of(model).generate(prompts, greedy())
    mixed = engine_of(model).generate(
        prompts, [greedy(max_recursions=1) if i % 2 else greedy() for i in range(len(prompts))]
    )
    for i, (one, other) in enumerate(zip(free, mixed, strict=True)):
        if i % 2:
            assert set(other.depths) == {1}
        else:
            assert other.token_ids == one.token_ids


def test_an_exit_threshold_holds_for_its_request_alone():
    model, prompts = small_model().double().eval(), some_prompts(6)
    params = [greedy(exit_threshold=t) for t in (0.5, 0.0, 1.0, 0.5, 0.0)]
    free = engine_of(model).generate(prompts, greedy())
    mixed = engine_of(model).generate(prompts, params)
    for one, other, asked in zip(free, mixed, params, strict=True):
        if asked.exit_threshold == 0.5:
            assert other.token_ids == one.token_ids
        else:  # the first recursion has capacity 1 and takes every token
            assert set(other.depths) == {3 if asked.exit_threshold == 0 else 1}


@pytest.mark.parametrize("chunk", [2, 64])
def test_log_probabilities_of_prompt_and_output(chunk):
    model, prompt = small_model().double().eval(), some_prompts(7, 1)[0] + [5, 6, 7]
    engine = engine_of(model, chunk=chunk)
    (output,) = engine.generate([prompt], greedy(logprobs=2, prompt_logprobs=1))
    with torch.no_grad():
        tokens = torch.tensor([[*prompt, *output.token_ids]])
        want = model(tokens, use_cache=False).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    got = [p.logprob for p in (*output.prompt_logprobs[1:], *output.logprobs)]
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), want[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    )
    assert all(len(p.top) == 2 and p.top[0][1] == p.logprob for p in output.logprobs)


def test_no_tokens_but_the_prompts_log_probabilities():
    engine = engine_of(small_model().double().eval())
    (output,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert output.token_ids == ()
    assert len(output.prompt_logprobs) == 3
    engine.check()


def test_a_deadline_ends_a_request():
    times = itertools.count()
    engine = engine_of(small_model().double().eval(), clock=lambda: float(next(times)))
    engine.add([5, 6, 7], greedy(50), deadline=20.0)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert deltas[-1].finish_reason == "deadline"
    engine.check()


def test_nan_logits_fail_their_request_only():
    """Trap 22."""
    model, prompts = small_model().double().eval(), [[5, 6], [7, 8]]
    want = engine_of(model).generate(prompts, greedy())
    with torch.no_grad():
        model.model.embed_tokens.weight = torch.nn.Parameter(
            model.model.embed_tokens.weight.clone()
        )
        model.model.embed_tokens.weight[5] = torch.nan
    model.lm_head.weight = torch.nn.Parameter(
        model.model.embed_tokens.weight.detach().nan_to_num(0.0)
    )
    failed, fine = engine_of(model, policy="lock-step").generate(prompts, greedy())
    assert failed.finish_reason == "error"
    assert "logit" in failed.error
    assert fine.token_ids[:1] == want[1].token_ids[:1]


def test_a_request_that_never_fits_is_refused():
    model = small_model().double().eval()
    engine = engine_of(model, kv_memory="8KiB")
    with pytest.raises(RequestError, match=r"tokens, max_tokens: expected .* num_blocks"):
        engine.add(list(range(3, 90)), greedy(100))
    with pytest.raises(RequestError, match="n: expected 1 to max_rows"):
        engine.add([3], SamplingParams(max_tokens=1, n=100))
    with pytest.raises(RequestError, match="max_tokens"):
        engine.add([3], greedy(10**6))
    engine.check()


def test_a_refused_prompt_leaves_none_of_the_others_behind():
    engine = engine_of(small_model().double().eval())
    with pytest.raises(RequestError, match="prompt"):
        engine.generate([[5, 6], [10**6]], greedy())
    while engine.has_work:
        assert not any(delta.token_ids for delta in engine.step())
    engine.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_memory": "2 apples"}, "kv_memory: expected bytes or"),
        ({"kv_memory": 1}, "kv_memory: expected at least a block"),
        ({"policy": "often"}, "policy"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(small_model().eval(), **options)
