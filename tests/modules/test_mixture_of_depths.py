"""A Mixture-of-Depths layer: exact k, residual kept, causal in evaluation."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mor.modules import MixtureOfDepths, RouterScore
from tests.support.host_reads import host_reads


def llama_layer():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)


def depths_layer(**options):
    """A mixture over a decoder layer, hidden states and the layer's other arguments."""
    layer, rotary = llama_layer()
    mixture = MixtureOfDepths(layer, 32, **{"capacity": 0.25, **options})
    x = torch.randn(3, 16, 32)
    positions = torch.arange(16).unsqueeze(0)
    return mixture, x, {"position_embeddings": rotary(x, positions)}


def reference(mixture, x, picked, position_embeddings):
    """`x + w * (layer(x) - x)` of picked [B, S], with a mask instead of a gather."""
    length = x.shape[1]
    w = x.float() @ mixture.recursion.routers[0].layers[0].weight[0]
    mask = torch.full((length, length), -torch.inf).triu(1)
    mask = mask.masked_fill(~picked[:, None, None, :], -torch.inf)
    mask = mask.masked_fill(~picked[:, None, :, None], 0.0)  # any value: not used
    y = mixture.block(x, attention_mask=mask, position_embeddings=position_embeddings)
    return torch.where(picked[..., None], x + w[..., None] * (y - x), x)


def test_picked_tokens_get_the_gated_layer_and_others_keep_their_state():
    mixture, x, arguments = depths_layer()
    w = x @ mixture.recursion.routers[0].layers[0].weight[0]
    picked = torch.zeros(3, 16, dtype=torch.bool).scatter(1, w.topk(4, dim=1).indices, True)
    got = mixture(x, **arguments)
    torch.testing.assert_close(got, reference(mixture, x, picked, **arguments))
    assert torch.equal(got[~picked], x[~picked])
    assert torch.equal(mixture.token_depths == 1, picked)
    mixture.eval()
    torch.testing.assert_close(
        mixture(x, **arguments), reference(mixture, x, w > 0, **arguments), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("capacity", "length", "k"), [(0.125, 64, 8), (0.125, 7, 1), (0.3, 10, 3), (0.5, 1, 1)]
)
def test_exactly_k_tokens_take_it(capacity, length, k):
    mixture = MixtureOfDepths(nn.Linear(8, 8), 8, capacity)
    mixture(torch.randn(4, length, 8))
    assert mixture.token_depths.sum(dim=1).tolist() == [k] * 4


def test_exactly_k_where_all_logits_tie():
    """`weights > kth value`, as a published package picks, takes none here; in general k - 1."""
    mixture = MixtureOfDepths(nn.Linear(8, 8), 8, 0.5)
    mixture(torch.ones(2, 6, 8))
    assert mixture.token_depths.tolist() == [[1, 1, 1, 0, 0, 0]] * 2


def test_pads_count_for_nothing():
    mixture, x, arguments = depths_layer(capacity=0.5)
    mask = torch.arange(16) < torch.tensor([[16], [9], [4]])
    got = mixture(x, token_mask=mask, **arguments)
    assert mixture.token_depths.sum(dim=1).tolist() == [8, 4, 2]
    assert torch.equal(got[~mask], x[~mask])


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_evaluation_is_causal_and_training_is_not(aux):
    mixture, x, arguments = depths_layer(aux=aux)
    mixture, x = mixture.double(), x.double()
    arguments = {"position_embeddings": tuple(e.double() for e in arguments["position_embeddings"])}
    for cut in (1, 6, 15):
        changed = x.clone()
        changed[:, cut:] = 4 * torch.randn(3, 16 - cut, 32)
        mixture.eval()
        before, after = (mixture(h, **arguments)[:, :cut] for h in (x, changed))
        torch.testing.assert_close(before, after, atol=1e-12, rtol=0)
    mixture.train()
    assert not torch.equal(*(mixture(h, **arguments)[:, :15] for h in (x, changed)))


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_the_loss_teaches_the_threshold_the_k_best(aux):
    torch.manual_seed(0)
    mixture = MixtureOfDepths(nn.Linear(16, 16), 16, 0.25, aux=aux)
    x = torch.randn(8, 32, 16) + 1  # routers have no bias: states are not centred at 0
    optimizer = torch.optim.Adam(mixture.recursion.parameters(), 0.05)
    for _ in range(200):
        mixture(x)
        mixture.routing.aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mixture(x)
    picked = mixture.token_depths
    mixture.eval()(x)
    assert (mixture.token_depths == picked).float().mean() > 0.85


@pytest.mark.parametrize("aux", ["loss", "router", None])
def test_gradients(aux):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    mixture = MixtureOfDepths(layer, 8, 0.5, aux=aux).double()
    nn.init.normal_(mixture.recursion.routers[0].layers[0].weight)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixture.named_parameters(), strict=True)

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        out = torch.func.functional_call(mixture, named, (x,))
        # The predictor's loss is taken on detached states, so it has no gradient to compare.
        return (out, mixture.routing.aux_loss) if aux == "loss" else out

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_training_never_waits_for_the_device(aux):
    mixture, x, arguments = depths_layer(aux=aux)

    def train():
        out = mixture(x, **arguments)
        (out.square().mean() + mixture.routing.aux_loss).backward()

    with host_reads() as reads:
        train()
    assert reads == []
    assert all(p.grad is not None for p in mixture.parameters())
    # Fake tensors have no values to read at all.
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixture, x, arguments = depths_layer(aux=aux)
        train()


def test_training_is_one_graph():
    torch._dynamo.reset()
    mixture, x, arguments = depths_layer()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    got = compiled(x, **arguments)
    torch.testing.assert_close(got, mixture(x, **arguments))
    (got.sum() + mixture.routing.aux_loss).backward()
    torch._dynamo.reset()


def test_autocast():
    mixture, x, arguments = depths_layer()
    with torch.autocast("cpu", torch.bfloat16):
        got = mixture(x, **arguments)
    assert got.dtype == torch.float32
    assert mixture.routing.steps[0].logits.dtype == torch.float32
    torch.testing.assert_close(got, mixture(x, **arguments), atol=0.05, rtol=0.05)


def test_saved_and_copied():
    mixture, x, arguments = depths_layer()
    mixture.eval()
    want = mixture(x, **arguments)
    other, _, _ = depths_layer()
    nn.init.normal_(other.recursion.routers[0].layers[0].weight)
    other.eval().load_state_dict(mixture.state_dict())
    saved = io.BytesIO()
    torch.save(mixture, saved)
    saved.seek(0)
    for same in (other, copy.deepcopy(mixture), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(same(x, **arguments), want)


def test_full_capacity_and_gate_one_is_the_layer():
    mixture, x, arguments = depths_layer(capacity=1.0, score=RouterScore("sigmoid", 2.0))
    nn.init.zeros_(mixture.recursion.routers[0].layers[0].weight)
    torch.testing.assert_close(mixture(x, **arguments), mixture.block(x, **arguments))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity": 0.0}, r"^MixtureOfDepths: capacity: expected a share in \(0, 1\], got 0.0"),
        ({"capacity": "all"}, r"^MixtureOfDepths: capacity: .*, got 'all'"),
        ({"capacities": [0.5]}, "^MixtureOfDepths: capacities: a Mixture-of-Depths layer has one"),
        ({"gating": "weighted"}, "^MixtureOfDepths: gating: "),
        ({"aux": "x"}, "^aux: expected loss, router or None, got 'x'"),
        ({"router_type": "x"}, "^router_type: expected one of"),
        ({"foo": 1}, r"^MixtureOfDepths: ExpertChoice has no option \['foo'\], only"),
        ({"arguments": {"mask": "token"}}, "^arguments: expected arguments that Linear takes"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MixtureOfDepths(nn.Linear(8, 8), 8, **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^MixtureOfDepths: expected hidden of shape \[B, S, 8\]"):
        MixtureOfDepths(nn.Linear(8, 8), 8)(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"^MixtureOfDepths: token_mask: expected shape \[2, 3\]"):
        MixtureOfDepths(nn.Linear(8, 8), 8)(torch.ones(2, 3, 8), token_mask=torch.ones(3, 2))
