"""mor.analysis against what is counted while a model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from mor import MoRConfig, MoRForCausalLM, analysis

from .models.conftest import small_config, small_model
from .models.test_generation import prompts

COUNTED = {
    "expert": {"router": "expert"},
    "expert-shared": {"router": "expert", "kv_strategy": "shared"},
    "expert-hybrid": {"router": "expert", "kv_strategy": "hybrid"},
    "expert-capacities": {"capacities": [0.75, 0.5, 0.25]},
    "recursive": {"router": None},
    "recursive-shared": {"router": None, "kv_strategy": "shared"},
}


@pytest.mark.parametrize("options", COUNTED.values(), ids=COUNTED)
def test_flops_are_those_counted(options):
    model = small_model(**options).train()
    length = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(prompts(2, length))
    counted = counter.get_total_flops() / (2 * length)
    predicted = analysis.flops_per_token(model.config, length)
    # Shared keys: the prediction spreads the selected queries evenly over the sequence.
    tolerance = 0.02 if options.get("kv_strategy", "recursion") != "recursion" else 1e-6
    assert counted == pytest.approx(predicted, rel=tolerance)


def test_training_flops_are_those_counted():
    model = small_model().train()
    tokens = prompts(2, 48)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    counted = counter.get_total_flops() / 96
    # The first layer's input needs no gradient, the embedding being a lookup: a little less.
    assert counted == pytest.approx(
        analysis.flops_per_token(model.config, 48, training=True), rel=0.02
    )


@pytest.mark.parametrize("options", COUNTED.values(), ids=COUNTED)
def test_kv_bytes_are_those_kept(options):
    model = small_model(**options).eval()
    with torch.no_grad():
        output = model(prompts(2, 48), use_cache=True)
    cache, kept = output.past_key_values, 0
    if model.config.router == "expert":  # a call with a cache selects by the threshold
        depths = output.token_depths
        model.config.capacities = [float((depths > r).float().mean()) for r in range(3)]
    for layer in cache.layers:
        if layer.lengths is not None:
            row = layer.keys[0, 0].numel() * layer.keys.element_size()
            kept += 2 * row * int(layer.lengths.sum())
    assert kept / 96 == pytest.approx(analysis.kv_bytes_per_token(model.config))


def test_parameters_and_dense_models():
    config = small_config()
    model, dense = MoRForCausalLM(config), LlamaForCausalLM(config.base_config)
    assert analysis.count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert analysis.count_parameters(config.base_config) == sum(
        p.numel() for p in dense.parameters()
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(prompts(1, 48))
    # PyTorch's counter knows no formula for the CPU's SDPA kernel; everything else agrees.
    parts = analysis.flops_breakdown(config.base_config, 48)
    full = sum(parts.values()) - parts["attention"]
    assert counter.get_total_flops() / 48 == pytest.approx(full, rel=1e-6)


def test_what_cannot_be_counted_is_refused():
    config = small_config()
    for shares in ([0.5, 0.9, 0.7], [1.2, 1.0, 0.5], [1.0, 0.5, -0.1]):
        with pytest.raises(ValueError, match=r"expected non-increasing shares in \[0, 1\]"):
            analysis.flops_per_token(config, 48, shares=shares)
    with pytest.raises(ValueError, match="Llama-like model, got a GPT2Config without intermed"):
        analysis.flops_per_token(GPT2Config(), 48)


@pytest.mark.parametrize(
    ("recursions", "layers", "unique", "flops", "own_keys", "shared_keys"),
    [
        (2, 32, 17, 0.746, 0.766, 0.531),
        (3, 32, 12, 0.664, 0.687, 0.375),
        (4, 34, 10, 0.661, 0.688, 0.312),
    ],
)
def test_paper_ratios(recursions, layers, unique, flops, own_keys, shared_keys):
    """The table of docs/models.md: MoR at 360M against 32 dense layers."""

    def dense(depth):
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=depth,
            num_attention_heads=15,
            num_key_value_heads=5,
        )

    def without_head(config):
        parts = analysis.flops_breakdown(config, 2048)
        return sum(parts.values()) - parts["head"] - parts["router"]

    config = MoRConfig(base_config=dense(layers), num_recursions=recursions)
    shared = MoRConfig(base_config=dense(layers), num_recursions=recursions, kv_strategy="shared")
    assert config.num_unique_layers == unique
    assert without_head(config) / without_head(dense(32)) == pytest.approx(flops, abs=6e-4)
    for kept, want in ((config, own_keys), (shared, shared_keys)):
        ratio = analysis.kv_bytes_per_token(kept) / analysis.kv_bytes_per_token(dense(32))
        assert ratio == pytest.approx(want, abs=6e-4)
