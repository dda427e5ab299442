"""Arguments of a wrapped block: each kept token sees the kept tokens that the mask lets it see.

Over 300 lines in one file, as `mor/modules/block_arguments.py` is: its layouts are tested together.
"""

from collections import namedtuple

import pytest
import torch
from torch import nn

from mor.modules import MixtureOfRecursions, RouterScore

B, S, D, HEADS = 3, 7, 16, 4
BLOCKED = torch.ones(S, S, dtype=torch.bool).triu(1)
CAUSAL = torch.zeros(S, S).masked_fill(BLOCKED, -torch.inf)
ROUTERS = ["expert", "token", None]


def encoder_layer(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True, **options)


def a_mask_of_each_head(batch: int = B) -> torch.Tensor:
    mask = torch.rand(batch * HEADS, S, S, generator=torch.Generator().manual_seed(1)) < 0.4
    return mask & ~torch.eye(S, dtype=torch.bool)


def padding(batch: int = B) -> torch.Tensor:
    return torch.arange(S) >= torch.tensor([S, 4, 6])[:batch].unsqueeze(1)


ENCODER_ARGUMENTS = {
    "none": {},
    "bool": {"src_mask": BLOCKED},
    "float": {"src_mask": CAUSAL},
    "bias": {"src_mask": torch.randn(S, S, generator=torch.Generator().manual_seed(2))},
    "hint": {"src_mask": CAUSAL, "is_causal": True},
    "heads": {"src_mask": a_mask_of_each_head()},
    "pads": {"src_key_padding_mask": padding()},
    "causal-pads": {"src_mask": BLOCKED, "src_key_padding_mask": padding()},
    "heads-pads": {"src_mask": a_mask_of_each_head(), "src_key_padding_mask": padding()},
}


def unchanged(block: nn.Module, router: str | None, **more) -> MixtureOfRecursions:
    """One recursion of every token with gate 1: the block alone."""
    options = {"gating": "residual", "score": RouterScore("none", 1.0)} if router else {}
    mixture = MixtureOfRecursions(block, D, 1, router, **more, **options)
    if router == "expert":  # a score of exactly 1 for every token, and so above the threshold
        mixture.recursion.routers[0] = Constant()
    elif router == "token":
        mixture.recursion.router = Constant()
    return mixture


class Constant(nn.Module):
    def forward(self, hidden, positions=None, learns=False):
        return torch.ones(hidden.shape[0], 1)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])  # eval: the fast path
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ENCODER_ARGUMENTS)
def test_a_wrapped_encoder_layer_takes_its_masks(name, router, training, grad):
    if name == "bias" and not training and not grad:
        pytest.skip("the layer's own fast path takes what is not 0 for -inf")
    layer = encoder_layer()
    mixture = unchanged(layer, router).train(training)
    x = torch.randn(B, S, D)
    with torch.set_grad_enabled(grad):
        got, want = mixture(x, **ENCODER_ARGUMENTS[name]), layer(x, **ENCODER_ARGUMENTS[name])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, HEADS), (B, HEADS)], ids=str)
def test_a_wrapped_encoder_layer_takes_masks_of_four_dimensions(shape, router, training):
    """It takes none by itself: `expected attn_mask to be None, 2-D or 3-D but found 4-D`."""
    mask = a_mask_of_each_head().reshape(B, HEADS, S, S)[: shape[0], : shape[1]]
    alone = mask.expand(B, HEADS, S, S).flatten(0, 1)
    layer, x = encoder_layer(), torch.randn(B, S, D)
    mixture = unchanged(layer, router).train(training)
    torch.testing.assert_close(mixture(x, mask), layer(x, alone))
    mixture = MixtureOfRecursions(layer, D, 2, router).train(training)
    torch.testing.assert_close(mixture(x, mask), mixture(x, alone))


def loop(mixture, x, visible, layer):
    """The recursions token by token: `visible(b, head, q, k)` is added to the scores."""
    hidden, out, routing = x.clone(), x.clone(), mixture.routing
    batch, length = x.shape[:2]
    depths = mixture.token_depths
    for step, taken in enumerate(routing.steps):
        hidden, before = hidden.clone(), hidden
        for b in range(batch):
            mine = taken.rows // length == b
            kept = (taken.rows[mine] % length).tolist()
            if not kept:
                continue
            mask = torch.stack(
                [
                    torch.tensor([[visible(b, h, q, k) for k in kept] for q in kept])
                    for h in range(HEADS)
                ]
            )
            y = layer(before[b : b + 1, kept], src_mask=mask)[0]
            for i, token in enumerate(kept):
                if taken.gates is not None:
                    gate = taken.gates[mine][i]
                    hidden[b, token] = before[b, token] + gate * y[i]
                else:
                    hidden[b, token] = y[i]
                    if depths[b, token] == step + 1:
                        gate = routing.gates.reshape(batch, length)[b, token]
                        out[b, token] = x[b, token] + gate * y[i]
    return out if routing.steps[0].gates is None else hidden


def weight(value) -> float:
    """What a mask's entry adds to a score."""
    if value.dtype == torch.bool:
        return -torch.inf if value else 0.0
    return float(value)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("name", ["none", "bool", "float", "bias", "hint", "heads"])
@pytest.mark.parametrize("batch", [1, B, S])
def test_a_kept_token_sees_the_kept_tokens_of_its_mask(name, router, training, batch):
    """S == B too, where a mask [S, S] has the shape of a padding mask [B, S]."""
    layer = encoder_layer()
    mixture = MixtureOfRecursions(layer, D, 2, router).train(training)
    arguments = dict(ENCODER_ARGUMENTS[name])
    if name == "heads":
        arguments["src_mask"] = a_mask_of_each_head(batch)
    mask = arguments.get("src_mask", torch.zeros(S, S))
    mask = mask.expand(batch * HEADS, S, S).reshape(batch, HEADS, S, S)
    x = torch.randn(batch, S, D)
    with torch.set_grad_enabled(name == "bias"):  # without: the layer's fast path
        got = mixture(x, **arguments)
        want = loop(mixture, x, lambda b, h, q, k: weight(mask[b, h, q, k]), layer)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert len(set(mixture.token_depths.flatten().tolist())) > 1, "no token was dropped"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("batch", [2, S])
def test_pads_of_a_key_padding_mask_are_not_seen(router, batch):
    layer = encoder_layer()
    mixture = MixtureOfRecursions(layer, D, 2, router).eval()
    pads = torch.arange(S) >= torch.tensor([S, 4, 6, 3, S, 2, 5])[:batch].unsqueeze(1)
    x = torch.randn(batch, S, D)
    got = mixture(x, BLOCKED, pads, token_mask=~pads)
    for b in range(batch):
        n = int((~pads[b]).sum())
        alone = mixture(x[b : b + 1, :n], src_mask=BLOCKED[:n, :n])
        torch.testing.assert_close(got[b, :n], alone[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[b, n:], x[b, n:])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_stack_of_encoder_layers_takes_its_masks(router, training):
    stack = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    mixture = unchanged(stack, router).train(training)
    x, pads = torch.randn(S, S, D), padding().repeat(3, 1)[:S]  # S == B
    with torch.no_grad():
        got = mixture(x, BLOCKED, src_key_padding_mask=pads)
        torch.testing.assert_close(got, stack(x, BLOCKED, src_key_padding_mask=pads))


class Attention(nn.Module):
    """A block of one's own, which adds its mask to scores [B, heads, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.heads = nn.Linear(D, 3 * D), HEADS

    def forward(self, hidden, mask=None, *others, bias=None, **more):
        q, k, v = self.project(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        for added in (mask, bias, *others, *more.values()):
            scores = scores if added is None else scores + added
        return hidden + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def dense(mixture, x, mask):
    """The block on whole sequences, tokens that were dropped hidden by the mask."""
    hidden = x
    for step in mixture.routing.steps:
        active = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.bool)
        active = active.index_fill(0, step.rows, True).reshape(x.shape[:2])
        hide = torch.zeros(x.shape[:2]).masked_fill(~active, -torch.inf)[:, None, None, :]
        y = mixture.block(hidden, (mask + hide).masked_fill(~active[:, None, :, None], 0.0))
        gates = torch.zeros(active.numel()).index_copy(0, step.rows, step.gates)
        hidden = hidden + gates.reshape(*x.shape[:2], 1) * y * active.unsqueeze(2)
    return hidden


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape",
    [(S, S), (1, 1, S, S), (B, 1, S, S), (1, HEADS, S, S), (B, HEADS, S, S), (B, 1, 1, S)],
    ids=str,
)
def test_masks_of_a_block_of_ones_own(shape, training):
    mixture = MixtureOfRecursions(Attention(), D, 2).train(training)
    x, mask = torch.randn(B, S, D), torch.randn(shape)
    got = mixture(x, mask)
    torch.testing.assert_close(got, dense(mixture, x, mask.expand(B, HEADS, S, S)))


def test_a_learnt_mask_gets_its_gradient_from_every_sequence():
    mixture = MixtureOfRecursions(Attention(), D, 2)
    x = torch.randn(B, S, D)
    mask = torch.zeros(S, S, requires_grad=True)
    (got,) = torch.autograd.grad(mixture(x, mask).square().sum(), mask)
    mixture(x, mask)
    want = torch.autograd.grad(dense(mixture, x, mask.expand(B, HEADS, S, S)).square().sum(), mask)[
        0
    ]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_mask_that_could_be_something_else_is_refused_until_it_is_named():
    x = torch.randn(S, S, D)  # S == B
    for name, arguments in {
        "mask": {"mask": torch.zeros(S, S)},
        "bias": {"bias": torch.zeros(S, S, S, S)},
        "slopes": {"slopes": torch.zeros(S, S, S)},
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: expected a shape .*arguments=\{{'{name}'"):
            MixtureOfRecursions(Attention(), D, 2)(x, **arguments)
    mixture = MixtureOfRecursions(Attention(), D, 2, arguments={"mask": "mask"})
    mask = torch.randn(S, S)
    torch.testing.assert_close(mixture(x, mask), dense(mixture, x, mask.expand(S, HEADS, S, S)))
    mixture = MixtureOfRecursions(Attention(), D, 2, arguments={1: "mask", 2: "mask", 3: "mask"})
    got = mixture(x, mask, mask, None)
    torch.testing.assert_close(got, dense(mixture, x, 2 * mask.expand(S, HEADS, S, S)))


@pytest.mark.parametrize("shape", [(S,), (S, D), (1, HEADS, S, D), (B, 1, S)])
def test_what_has_tokens_in_another_dimension_is_refused(shape):
    with pytest.raises(ValueError, match=rf"bias: expected a shape .*got \[{shape[0]}"):
        MixtureOfRecursions(Attention(), D, 2)(torch.randn(B, S, D), bias=torch.zeros(shape))
    mixture = MixtureOfRecursions(nn.Identity(), D, 2, router=None)  # which cuts nothing
    assert mixture(torch.randn(B, S, D)).shape == (B, S, D)


def test_what_was_named_must_have_the_layout():
    x = torch.randn(B, S, D)
    for layout, shape in (("mask", (B, S)), ("token", (S, D)), ("sequence", (S,))):
        mixture = MixtureOfRecursions(Attention(), D, 2, arguments={"bias": layout})
        with pytest.raises(ValueError, match=rf"bias: .* said to be '{layout}', got \[{shape[0]}"):
            mixture(x, bias=torch.zeros(shape))


def test_arguments_that_the_block_does_not_have_are_refused():
    layer = encoder_layer()
    for key in ("mask", 4, 0, -1):
        with pytest.raises(ValueError, match=r"TransformerEncoderLayer takes .*'src_mask'"):
            MixtureOfRecursions(layer, D, 2, arguments={key: "mask"})
    with pytest.raises(ValueError, match=r"arguments\['src_mask'\]: expected one of"):
        MixtureOfRecursions(layer, D, 2, arguments={"src_mask": "tokens"})


def test_sequences_keep_their_memory_and_conditions():
    """Cross-attention to as many entries as there are tokens; a condition [B, D]."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True)

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, hidden, memory, condition, table):
            assert table.shape == (11, D)
            return self.layer(hidden, memory) * condition["scale"].unsqueeze(1)

    mixture = MixtureOfRecursions(Conditioned(), D, 2).eval()
    x, memory, scale = torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(B, D)
    table = torch.zeros(11, D)
    got = mixture(x, memory, {"scale": scale}, table)
    assert len(set(mixture.token_depths.sum(dim=1).tolist())) > 1, "sequences keep as many tokens"
    for b in range(B):
        one = mixture(x[b : b + 1], memory[b : b + 1], {"scale": scale[b : b + 1]}, table)
        torch.testing.assert_close(got[b : b + 1], one, atol=1e-5, rtol=1e-5)


def test_named_tuples_stay_named_tuples():
    Angles = namedtuple("Angles", "cos sin")

    class Block(nn.Module):
        def forward(self, hidden, angles):
            return hidden * angles.cos + angles.sin

    mixture = MixtureOfRecursions(Block(), D, 2, arguments={"angles": "token"})
    x = torch.randn(2, D, D)  # as many tokens as angles: the shape of a mask
    assert mixture(x, Angles(torch.ones(1, D, D), torch.zeros(1, D, D))).shape == x.shape


def test_an_encoder_layer_that_is_not_batch_first_is_refused():
    """It would take sequences for tokens."""
    layer = nn.TransformerEncoderLayer(D, HEADS)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for block in (layer, stack, nn.GRU(D, D)):
        with pytest.raises(ValueError, match=r"expected a block of .* with batch_first=True"):
            MixtureOfRecursions(block, D, 2)
