"""Small models shared by the model tests."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mor
from mor import MoRConfig, MoRForCausalLM


def small_config(num_hidden_layers: int = 8, **options) -> MoRConfig:
    base = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return MoRConfig(base_config=base, **{"num_recursions": 3, **options})


def small_model(seed: int = 0, **options) -> MoRForCausalLM:
    torch.manual_seed(seed)
    return MoRForCausalLM(small_config(**options))


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    """The dense model that `small_swapped` swaps."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(small_config().base_config)


def small_swapped(layers=(1, 7), seed: int = 0, **options):
    return mor.swap(small_llama(seed), layers, **{"num_recursions": 3, **options})


#: Every way a model holds routed layers, for tests of what people do with models.
MODELS: dict[str, Callable[..., torch.nn.Module]] = {
    "expert": small_model,
    "token": partial(small_model, router="token"),
    "shared": partial(small_model, kv_strategy="shared"),
    "hybrid": partial(small_model, kv_strategy="hybrid", router="token"),
    "recursive": partial(small_model, router=None),
    "lora": partial(small_model, relaxation="lora", relaxation_rank=2, kv_strategy="shared"),
    "swap-expert": small_swapped,
    "swap-token": partial(small_swapped, router="token"),
    "swap-one": partial(small_swapped, layers=3),
}


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[..., torch.nn.Module]:
    return MODELS[request.param]


def rowwise_linear(x, weight, bias=None):
    """A matrix product whose rows cannot depend on how many rows there are, unlike a library's."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


@pytest.fixture(params=["rowwise", "library"])
def exactness(request, monkeypatch) -> tuple[torch.dtype, float]:
    """The dtype to compute in, and how far rounding may take results that should be the same.

    A BLAS, and the tiles of depth_attention, round a row differently when there are more or fewer
    rows beside it, and later tokens decide how many rows a recursion has. With row-wise products
    and in float64, where depth_attention has no tiles, the difference is exactly zero.
    """
    if request.param == "library":
        return torch.float32, 1e-5
    monkeypatch.setattr(torch.nn.functional, "linear", rowwise_linear)
    return torch.float64, 0.0


def check_causal_evaluation(
    model, tokens, cuts, exactness, depths_of=lambda output: output.token_depths, **inputs
):
    """Tokens from each cut on change: no logit and no depth before it does."""
    dtype, tolerance = exactness
    generator = torch.Generator().manual_seed(7)
    model = model.to(dtype).eval()
    with torch.no_grad():
        before = model(tokens, use_cache=False, **inputs)
        depths_before = depths_of(before)
        for cut in cuts:
            changed = tokens.clone()
            rest = changed[:, cut:]
            rest[:] = torch.randint(3, 97, rest.shape, generator=generator)
            after = model(changed, use_cache=False, **inputs)
            assert torch.equal(depths_of(after)[:, :cut], depths_before[:, :cut])
            difference = (after.logits - before.logits).abs()
            assert difference[:, :cut].max() <= tolerance
            assert difference[:, cut:].max() > 0.1


#: Combinations of routing, sharing and KV strategy that every model test runs.
VARIANTS = {
    "expert": {"router": "expert"},
    "expert-cycle": {"router": "expert", "sharing": "cycle", "num_hidden_layers": 6},
    "expert-shared": {"router": "expert", "kv_strategy": "shared"},
    "expert-hybrid": {"router": "expert", "kv_strategy": "hybrid"},
    "expert-aux-router": {"router": "expert", "router_aux": "router"},
    "expert-mlp-tanh": {"router": "expert", "router_type": "mlp", "router_func": "tanh"},
    "token": {"router": "token"},
    "token-cycle": {"router": "token", "sharing": "cycle", "num_hidden_layers": 6},
    "token-shared": {"router": "token", "kv_strategy": "shared"},
    "token-hybrid": {"router": "token", "kv_strategy": "hybrid"},
    "token-loss-free": {"router": "token", "router_balancing": "loss_free"},
    "token-additive": {"router": "token", "router_gating": "additive"},
    "expert-residual": {"router": "expert", "router_gating": "residual"},
    "token-residual-shared": {
        "router": "token",
        "router_gating": "residual",
        "kv_strategy": "shared",
    },
    "expert-cycle-shared": {
        "router": "expert",
        "sharing": "cycle",
        "num_hidden_layers": 6,
        "kv_strategy": "shared",
    },
    "recursive": {"router": None},
    "recursive-shared": {"router": None, "kv_strategy": "shared"},
    "recursive-hybrid": {"router": None, "kv_strategy": "hybrid"},
    "recursive-sequence": {"router": None, "sharing": "sequence", "num_hidden_layers": 6},
    "recursive-middle-sequence": {"router": None, "sharing": "middle_sequence"},
}


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> dict:
    return VARIANTS[request.param]
