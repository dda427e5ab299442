"""Any block becomes a Mixture-of-Recursions layer.

Over 300 lines in one file, as a module has one test file beside that of its arguments.
"""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

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
    for mask, words in (
        (torch.ones(3, 2), r"token_mask: expected shape \[2, 3\], got \[3, 2\]"),
        (torch.tensor([[0, 0, -1e9], [0, 0, 0]]), "token_mask: .* got negative values"),
    ):
        with pytest.raises(ValueError, match=words):
            MixtureOfRecursions(nn.Identity(), 4, 2)(torch.ones(2, 3, 4), token_mask=mask)
    with pytest.raises(ValueError, match="router: expected expert, token or None, got 'both'"):
        MixtureOfRecursions(nn.Identity(), 4, 2, "both")
    with pytest.raises(ValueError, match="num_recursions: expected at least 1"):
        MixtureOfRecursions(nn.Identity(), 4, 0)


@pytest.mark.parametrize(
    ("router", "options", "sentence"),
    [
        ("expert", {"foo": 1}, r"^MixtureOfRecursions: ExpertChoice has no option \['foo'\], only"),
        ("token", {"capacities": [1]}, r"TokenChoice has no option .*'gating'"),
        (
            None,
            {"gating": "x"},
            r"^MixtureOfRecursions: router=None has no options, got \['gating'",
        ),
        ("expert", {"gating": "gated"}, "^gating: expected one of"),
        ("token", {"gating": "gated"}, "^gating: expected one of"),
        ("token", {"balancing": "x"}, "^balancing: expected loss"),
        ("expert", {"aux": "x"}, "^aux: expected loss"),
        ("expert", {"temperature": 0}, "^temperature: expected a positive number"),
        ("expert", {"score": {"alpha": 1.0}}, r"score: expected a RouterScore, or a dict .*, got"),
        ("token", {"score": "sigmoid"}, r"score: expected a RouterScore, or a dict .*, got"),
        ("expert", {"score": {"function": "relu", "alpha": 1}}, "^score: expected a function of"),
        ("expert", {"score": {"function": "tanh", "alpha": 0}}, "^score: expected a positive"),
        ("expert", {"score": RouterScore("softmax", 1.0)}, "^score: softmax needs several"),
    ],
)
def test_an_error_names_the_option_that_was_given(router, options, sentence):
    """They named `router_gating` to who had written `gating`, and listed no options."""
    with pytest.raises(ValueError, match=sentence):
        MixtureOfRecursions(nn.Identity(), 4, 2, router, **options)


def test_score_may_be_a_dict_as_in_swap():
    score = {"function": "tanh", "alpha": 0.3}
    layer = MixtureOfRecursions(nn.Identity(), 4, 2, score=score)
    assert layer.recursion.score == RouterScore("tanh", 0.3)


@pytest.mark.parametrize("router", ["expert", "token", None])
def test_depths_are_there_for_each_token_of_the_batch(router):
    """`routing.depths` is packed: pads are not in it."""
    layer = MixtureOfRecursions(nn.Linear(8, 8), 8, 3, router)
    assert layer.token_depths is None
    layer(torch.randn(2, 6, 8))
    if router is not None:
        assert torch.equal(layer.token_depths.flatten(), layer.routing.depths)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    layer(torch.randn(2, 6, 8), token_mask=mask)
    assert layer.token_depths.shape == (2, 6)
    assert (layer.token_depths[mask == 0] == 0).all()
    if router is None:
        assert (layer.token_depths[mask == 1] == 3).all()
    else:
        assert torch.equal(layer.token_depths[mask == 1], layer.routing.depths)


def stepped(router: str | None) -> tuple[MixtureOfRecursions, torch.Tensor, torch.Tensor]:
    """A layer after a training step, an input, and what it makes of it in evaluation."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer, x = MixtureOfRecursions(block, 8, 2, router), torch.randn(3, 6, 8)
    layer(x, src_mask=torch.zeros(6, 6)).square().sum().backward()
    layer.zero_grad()
    layer.eval()
    return layer, x, layer(x)


@pytest.mark.parametrize("router", ["expert", "token", None])
def test_a_layer_is_copied_and_pickled_after_a_step(router):
    layer, x, want = stepped(router)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied in (copy.deepcopy(layer), averaged.module, loaded):
        assert copied.routing is None
        assert copied.token_depths is None
        torch.testing.assert_close(copied(x), want)


@pytest.mark.parametrize("router", ["expert", "token", None])
def test_inference_mode_then_training(router):
    layer, x, want = stepped(router)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), want)
    layer.train()
    layer(x).sum().backward()
    if router is not None:
        assert layer.recursion.metrics.compute()["selected_share_1"] > 0


@pytest.mark.parametrize("router", ["expert", "token"])
def test_threads_read_the_routing_of_their_own_calls(router):
    layer, x, _ = stepped(router)
    barrier = threading.Barrier(2)

    def call(length: int) -> torch.Tensor:
        for _ in range(5):
            out = layer(x[:, :length])
            barrier.wait(timeout=30)
            assert layer.token_depths.shape == (3, length)
            assert layer.routing.depths.shape == (3 * length,)
            barrier.wait(timeout=30)
        return out

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(call, [4, 6]))
    for out in outputs:
        torch.testing.assert_close(out, layer(x[:, : out.shape[1]]))


def tokens_leave_at_once(layer: MixtureOfRecursions) -> None:
    for parameter in layer.recursion.parameters():
        nn.init.zeros_(parameter)


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("batch", ["no token goes on", "no token", "no sequence", "no place"])
def test_a_step_without_tokens_still_calls_the_block(router, batch):
    """Else processes of DDP and FSDP would wait for each other."""
    layer, x, _ = stepped(router)
    mask, pads = torch.zeros(6, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    heads = torch.zeros(6, 6, 6, dtype=torch.bool)
    pads[:, 0] = True
    if batch == "no token goes on":
        tokens_leave_at_once(layer)
    elif batch == "no sequence":
        x, pads, heads = x[:0], pads[:0], heads[:0]
    elif batch == "no place":
        x, pads, mask, heads = x[:, :0], pads[:, :0], mask[:0, :0], heads[:, :0, :0]
    token_mask = ~pads if batch != "no token" else torch.zeros_like(pads)
    calls = []
    layer.block.register_forward_hook(lambda *_: calls.append(1))
    for src_mask in (mask, heads):
        calls.clear()
        layer.zero_grad()
        out = layer(x, src_mask, pads, token_mask=token_mask)
        assert out.shape == x.shape
        assert len(calls) >= 2
        out.sum().backward()
        grads = [p.grad for p in layer.block.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("router", ["expert", "token", None])
def test_a_block_that_autocast_makes_narrower(router):
    layer = MixtureOfRecursions(nn.Linear(8, 8), 8, 2, router)
    x = torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), layer(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("router", "mask"), [("expert", (6, 6)), ("expert", (1, 1, 6, 6)), (None, None)], ids=str
)
def test_training_of_a_wrapped_block_is_one_graph(router, mask):
    """Which leaves its routing too: what was written to a `threading.local` class was lost."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MixtureOfRecursions(AddsMask(), 8, 2, router)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 8)
    arguments = () if mask is None else (torch.randn(mask),)
    got = compiled(x, *arguments)
    depths, routing = layer.token_depths, layer.routing
    torch.testing.assert_close(got, layer(x, *arguments))
    assert torch.equal(depths, layer.token_depths)
    loss = got.sum() if router is None else got.sum() + routing.aux_loss
    loss.backward()
    torch._dynamo.reset()


class AddsMask(nn.Module):
    """Mixes tokens by the softmax of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden, mask=None):
        scores = hidden @ hidden.mT
        if mask is not None:
            scores = scores + mask.reshape(-1, *scores.shape[1:])
        return self.linear(scores.softmax(-1) @ hidden)
