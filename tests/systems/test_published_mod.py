"""PyPI's mixture-of-depth beside ours: it takes one token fewer, and scales the residual stream."""

from importlib import util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mor.modules import MixtureOfDepths, MixtureOfRecursions, RouterScore

LENGTH, WIDTH = 16, 32


@pytest.fixture(scope="module")
def published():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "published_mod.py"
    spec = util.spec_from_file_location("published_mod", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.published_layer() is None:
        pytest.skip("mixture-of-depth is not installed")
    return module


@pytest.fixture
def config():
    torch.manual_seed(0)
    return LlamaConfig(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=2)


def theirs(published, layer, config, capacity, weight):
    """Their layer with our router's weight, which in evaluation keeps its capacity."""
    block = published.WithAngles(layer, LlamaRotaryEmbedding(config), WIDTH)
    layer = published.published_layer()(capacity, block).eval()
    layer.router.weight_predictor.weight = weight
    torch.nn.init.zeros_(layer.router.weight_predictor.bias)
    positions = torch.arange(LENGTH).expand(2, -1)
    return lambda x: layer(x, None, positions, None, False, False)[0]


def run_both(published, config, ours, capacity, x):
    weight = ours.recursion.routers[0].layers[0].weight
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    with torch.no_grad():
        want = theirs(published, ours.block, config, capacity, weight)(x)
        return want, ours(x, position_embeddings=angles)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_ours_takes_exactly_k_and_theirs_all_but_the_last_of_them(published, config, k):
    ours = MixtureOfDepths(LlamaDecoderLayer(config, 0), WIDTH, k / LENGTH).train()
    x = torch.randn(2, LENGTH, WIDTH)
    want, _ = run_both(published, config, ours, k / LENGTH, x)
    logits = x @ ours.recursion.routers[0].layers[0].weight[0]
    best = logits.argsort(dim=1, descending=True)[:, :k]
    taken = ours.token_depths.bool()
    assert taken.sum(dim=1).tolist() == [k, k]
    assert taken.gather(1, best).all()
    changed = (want != x).any(dim=-1)
    assert changed.sum(dim=1).tolist() == [k - 1, k - 1]
    assert (taken & ~changed).nonzero()[:, 1].tolist() == best[:, -1].tolist()
    assert not (changed & ~taken).any()


def test_on_tied_logits_theirs_takes_nothing(published, config):
    ours = MixtureOfDepths(LlamaDecoderLayer(config, 0), WIDTH, 0.25).train()
    torch.nn.init.zeros_(ours.recursion.routers[0].layers[0].weight)
    x = torch.randn(2, LENGTH, WIDTH)
    want, _ = run_both(published, config, ours, 0.25, x)
    assert torch.equal(want, x)
    assert ours.token_depths.tolist() == [[1] * 4 + [0] * 12] * 2  # ties go to earlier tokens


def test_with_one_token_fewer_and_the_whole_layer_weighed_ours_computes_theirs(published, config):
    """Theirs is w * layer(x) of a taken token; Mixture-of-Depths is x + w * (layer(x) - x)."""
    k = 5
    ours = MixtureOfRecursions(
        LlamaDecoderLayer(config, 0), WIDTH, 1, "expert", capacities=[(k - 1) / LENGTH],
        gating="weighted", score=RouterScore("none", 1.0),
    ).train()  # fmt: skip
    x = torch.randn(2, LENGTH, WIDTH)
    want, got = run_both(published, config, ours, k / LENGTH, x)
    taken = ours.token_depths.bool().unsqueeze(-1)
    torch.testing.assert_close(want, torch.where(taken, got - x, x), atol=1e-6, rtol=1e-5)
