"""Any block becomes a Mixture-of-Recursions layer."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mor.modules import MixtureOfRecursions, RouterScore


class OnlyDelta(nn.Module):
    """A block whose result is what it adds, so that H + 1 * f(H) is one ordinary layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden, *args, **kwargs) - hidden


def causal(length: int) -> torch.Tensor:
    return torch.full((length, length), -torch.inf).triu(1).view(1, 1, length, length)


def llama_layer(seed: int = 0):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)


def test_capacity_one_and_gate_one_is_the_block_alone():
    layer, rotary = llama_layer()
    x = torch.randn(2, 10, 32)
    positions = torch.arange(10).unsqueeze(0)
    arguments = {
        "attention_mask": causal(10),
        "position_embeddings": rotary(x, positions),
        "position_ids": positions,
    }
    mixture = MixtureOfRecursions(OnlyDelta(layer), 32, 1, capacities=[1.0], gating="additive")
    torch.testing.assert_close(mixture(x, **arguments), layer(x, **arguments))


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("training", [True, False])
def test_selected_tokens_attend_only_to_each_other(router, training):
    """The wrapped block on selected tokens equals a dense block with the mask of the routing."""
    layer, rotary = llama_layer()
    mixture = MixtureOfRecursions(layer, 32, 2, router).train(training)
    x = torch.randn(3, 12, 32)
    positions = torch.arange(12).unsqueeze(0)
    embeddings = rotary(x, positions)
    got = mixture(x, attention_mask=causal(12), position_embeddings=embeddings)
    depths = mixture.routing
    hidden, first = x, x
    for step in range(2):
        rows = depths.steps[step].rows
        active = torch.zeros(36, dtype=torch.bool)
        active[rows] = True
        active = active.reshape(3, 12)
        mask = causal(12).expand(3, -1, -1, -1).clone()
        mask = mask.masked_fill(~active[:, None, None, :], -torch.inf)
        mask = mask.masked_fill(~active[:, None, :, None], 0.0)  # any value: not used
        y = layer(hidden, attention_mask=mask, position_embeddings=embeddings)
        if router == "expert":
            gates = torch.zeros(36).index_copy(0, rows, depths.steps[step].gates).reshape(3, 12, 1)
            hidden = torch.where(active[..., None], hidden + gates * y, hidden)
        else:
            hidden = torch.where(active[..., None], y, hidden)
            leaves = (depths.depths.reshape(3, 12) == step + 1)[..., None]
            first = torch.where(leaves, x + depths.gates.reshape(3, 12, 1) * y, first)
    want = hidden if router == "expert" else first
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ["expert", "token", None])
def test_it_trains(router):
    mixture = MixtureOfRecursions(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 8, 3, router)
    x = torch.randn(2, 6, 8, requires_grad=True)
    out = mixture(x)
    loss = out.square().mean()
    if router is not None:
        loss = loss + (
            mixture.routing.aux_loss if router == "expert" else mixture.routing.balancing_loss
        )
    loss.backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in mixture.parameters())


def test_tuples_of_the_block_are_kept():
    class Block(nn.Module):
        def forward(self, hidden):
            return hidden * 2, "weights"

    out, weights = MixtureOfRecursions(Block(), 4, 2, None)(torch.ones(1, 3, 4))
    assert weights == "weights"
    assert torch.equal(out, torch.full((1, 3, 4), 4.0))
    out, weights = MixtureOfRecursions(Block(), 4, 2, "token")(torch.ones(1, 3, 4))
    assert weights == "weights"


@pytest.mark.parametrize("router", ["expert", "token"])
def test_pads_take_no_recursion(router):
    mixture = MixtureOfRecursions(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 8, 2, router)
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    out = mixture(x, token_mask=mask)
    assert torch.equal(out[mask == 0], x[mask == 0])
    for row, n in enumerate([3, 5]):
        torch.testing.assert_close(out[row, :n], mixture(x[row : row + 1, :n])[0])


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected hidden of shape \[B, S, 4\], got \[3, 4\]"):
        MixtureOfRecursions(nn.Identity(), 4, 2)(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"expected hidden of shape \[B, S, 4\], got \[2, 3, 5\]"):
        MixtureOfRecursions(nn.Identity(), 4, 2)(torch.ones(2, 3, 5))
    encoder = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    with pytest.raises(ValueError, match="expected masks of shape"):
        MixtureOfRecursions(encoder, 4, 2)(torch.ones(2, 6, 4), src_mask=torch.zeros(6, 6))
    with pytest.raises(ValueError, match="router: expected expert, token or None"):
        MixtureOfRecursions(nn.Identity(), 4, 2, "both")
    with pytest.raises(ValueError, match="num_recursions: expected at least 1"):
        MixtureOfRecursions(nn.Identity(), 4, 0)
    with pytest.raises(ValueError, match="softmax needs several outputs"):
        MixtureOfRecursions(nn.Identity(), 4, 2, score=RouterScore("softmax", 1.0))
