"""Small models shared by the model tests."""

import pytest
import torch
from transformers import LlamaConfig

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


def rowwise_linear(x, weight, bias=None):
    """A matrix product whose rows cannot depend on how many rows there are, unlike a library's."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


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
