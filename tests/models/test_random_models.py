"""Properties of any model: causal in evaluation, and generated with a cache as without.

Models, batches and paddings are drawn by hypothesis: few in the default run, the same ones each
time; hundreds of new ones in the slow run. In float64, where depth_attention works row by row, and
with row-wise matrix products both properties leave no room for rounding to hide an error.
"""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from mor import MoRConfig, MoRForCausalLM

from .conftest import rowwise_linear
from .test_generation import generate_greedily, padded

few = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
many = settings(few, max_examples=300, derandomize=False)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", rowwise_linear)


@st.composite
def models(draw: st.DrawFn) -> MoRForCausalLM:
    """A small random model of any variant, in evaluation mode and float64."""
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    recursions, block = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    options = {
        "num_recursions": recursions,
        "sharing": choose("middle_cycle", "cycle", "middle_sequence", "sequence"),
        "router": choose("expert", "expert", "token", "token", None),
        "kv_strategy": choose("recursion", "shared", "hybrid"),
        "router_type": choose("linear", "mlp", "wide_mlp", "random"),
        "router_gating": choose("weighted", "additive", "residual"),
        "router_alpha": choose(0.1, 1.0),
        "recursion_encoding": recursions > 1 and choose(True, False),
    }
    random = options["router_type"] == "random"
    if options["router"] is not None:
        assume(not options["sharing"].endswith("sequence"))
    if options["router"] == "expert":
        options["router_func"] = "none" if random else choose("sigmoid", "tanh", "none")
        options["router_aux"] = choose("loss", "router", None)
        if options["kv_strategy"] == "recursion":
            shares = draw(st.lists(st.floats(0.1, 1), min_size=recursions, max_size=recursions))
            options["capacities"] = sorted(shares, reverse=True)
    if options["router"] == "token":
        options["router_func"] = "none" if random else choose("softmax", "sigmoid")
        options["router_balancing"] = choose("loss", "loss_free", None)
    if options["router_gating"] == "additive":
        options["router_z_coef"] = 0.001  # or nothing trains the router
    ends = 2 if options["sharing"].startswith("middle") else 0
    kv_heads, head_dim = choose(1, 2), choose(4, 8, 10)
    heads = kv_heads * choose(1, 3)
    base = LlamaConfig(
        vocab_size=97,
        hidden_size=heads * head_dim,
        head_dim=head_dim,
        intermediate_size=24,
        num_hidden_layers=recursions * block + ends,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return MoRForCausalLM(MoRConfig(base_config=base, **options)).double().eval()


def check_causality(
    model: MoRForCausalLM, length: int, cut: int, pads: int, side: str, seed: int
) -> None:
    """From token `cut` of each sequence on, tokens change; the second sequence has pads."""
    tokens, mask = padded([length + pads, length], side)
    tokens = (tokens + seed) % 94 * mask + 3 * mask
    before_cut = (mask.cumsum(1) <= cut) & (mask == 1)
    changed = torch.where(before_cut | (mask == 0), tokens, (tokens + 1 - 3) % 94 + 3)
    with torch.no_grad():
        before, after = (model(t, attention_mask=mask, use_cache=False) for t in (tokens, changed))
    assert torch.equal(after.token_depths[before_cut], before.token_depths[before_cut])
    assert torch.equal(after.logits[before_cut], before.logits[before_cut])
    rest = ~before_cut & (mask == 1)
    assert not torch.equal(after.logits[rest], before.logits[rest])


def check_cached_generation(model: MoRForCausalLM, lengths: list[int], side: str) -> None:
    tokens, mask = padded(lengths, side)
    sequences, cached = generate_greedily(model, tokens, mask, steps=5)
    new = sequences[:, tokens.shape[1] :]
    for row, length in enumerate(lengths):
        prompt = tokens[row][mask[row] == 1]
        with torch.no_grad():
            full = model(torch.cat([prompt, new[row]])[None], use_cache=False).logits
        full = full[0, length - 1 : -1].float()  # as generate returns logits
        torch.testing.assert_close(cached[row], full, atol=1e-6, rtol=1e-6)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=7)
sides = st.sampled_from(["left", "right"])
cuts = st.integers(2, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@few
@given(models(), cuts, st.integers(0, 3), sides, st.integers(0, 93))
def test_no_logit_depends_on_a_later_token(model, length_and_cut, pads, side, seed):
    check_causality(model, *length_and_cut, pads, side, seed)


@few
@given(models(), lengths, sides)
def test_cached_generation_equals_the_full_forward(model, lengths, side):
    check_cached_generation(model, lengths, side)


@pytest.mark.slow
@many
@given(models(), cuts, st.integers(0, 3), sides, st.integers(0, 93))
def test_no_logit_depends_on_a_later_token_in_many_models(model, length_and_cut, pads, side, seed):
    check_causality(model, *length_and_cut, pads, side, seed)


@pytest.mark.slow
@many
@given(models(), lengths, sides)
def test_cached_generation_equals_the_full_forward_in_many_models(model, lengths, side):
    check_cached_generation(model, lengths, side)
