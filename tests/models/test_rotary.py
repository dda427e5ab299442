"""Rotary types whose angles depend on the length of a call: one set of them for all recursions."""

import pytest
import torch

from mor import MoRConfig, MoRForCausalLM

from .conftest import small_config
from .test_generation import prompts

TYPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0 + i for i in range(8)],
    },
}


@pytest.mark.parametrize("options", [{}, {"router": "token"}, {"kv_strategy": "shared"}], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_all_recursions_of_a_call_turn_by_the_same_angles(kind, options):
    """Later recursions, of fewer tokens, had the angles of a shorter text."""
    base = small_config().base_config
    base.rope_parameters = dict(TYPES[kind])
    base.max_position_embeddings = 16 if kind == "dynamic" else 64
    torch.manual_seed(0)
    model = MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3, **options)).eval()
    turned = []

    def note(module, args, kwargs):
        turned.append((kwargs["mor_context"].packing.positions, kwargs["position_embeddings"]))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    rotary = model.model.rotary_emb
    with torch.no_grad():
        model(prompts(1, 40))
        cos, sin = rotary(torch.zeros(1, 40, 64), torch.arange(40)[None])
    assert min(len(at) for at, _ in turned) < 40  # some recursion has fewer tokens
    for at, angles in turned:
        torch.testing.assert_close(angles[0], cos[:, at])
        torch.testing.assert_close(angles[1], sin[:, at])
