"""DynaMoE against a slow reference, and what each gate promises."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mor.modules import GATES, DynaMoE, Experts
from mor.modules.dynamoe import expert_balancing_loss
from mor.modules.experts import grouped_linear

from .dynamoe_reference import dynamoe

#: Options under which the reference is compared.
VARIANTS = {
    "default": {},
    "bounds": {"min_k": 2, "max_k": 3},
    "renormalised": {"second_softmax": False, "temperature": 0.2},
    "gated": {"gated": True, "activation": functional.silu, "bias": True},
}


def sharp(layer: DynaMoE, scale: float = 1.0) -> DynaMoE:
    """The layer with a router whose gates differ visibly."""
    torch.nn.init.normal_(layer.gate.router.layers[0].weight, std=scale)
    return layer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_slow_reference(gate: str, variant: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(6, 10, 5, gate=gate, noise=0.0, **VARIANTS[variant])).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    out, (want, counts) = layer(x), dynamoe(layer, x.reshape(-1, 6))
    assert layer.num_active_experts.flatten().tolist() == counts
    torch.testing.assert_close(out.reshape(-1, 6), want, rtol=1e-12, atol=1e-12)
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn_like(want)
    got = torch.autograd.grad(out, inputs, cotangent.view_as(out))
    for one, other in zip(got, torch.autograd.grad(want, inputs, cotangent), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    torch.manual_seed(1)
    layer = sharp(DynaMoE(3, 2, 3, gate=gate, noise=0.0)).double()
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def of(x: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return out, layer.routing.balancing_loss

    assert torch.autograd.gradcheck(of, (x, *parameters.values()))


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8, 16, 64])
def test_the_published_gate_is_fixed_k(num_experts: int) -> None:
    """Proof: an interpolated quantile of E distinct numbers at h = tau (E - 1) lies in the interval
    from number floor(h) to the next (from 0, ascending), so exactly E - 1 - floor(h) are above it,
    whatever they are."""
    torch.manual_seed(0)
    x = torch.randn(1, 500, 16) * torch.logspace(-1, 0.5, 500)[:, None]  # unsure and confident
    for tau in (0.0, 0.1, 0.25, 0.5, 0.7, 0.75, 0.9, 1.0):
        layer = sharp(DynaMoE(16, 4, num_experts, gate="row_quantile", threshold=tau), 0.2)
        layer(x)
        (count,) = layer.num_active_experts.unique().tolist()
        assert count == layer.gate.fixed_count
        above = num_experts - 1 - int(torch.tensor(tau) * (num_experts - 1))
        assert count == max(1, above)


@pytest.mark.parametrize("gate", sorted({*GATES} - {"row_quantile"}))
def test_the_other_gates_vary(gate: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(16, 4, 8, gate=gate), 0.2)
    layer(torch.randn(4, 100, 16))
    assert len(layer.num_active_experts.unique()) > 2
    assert layer.gate.fixed_count is None


@pytest.mark.parametrize("gate", GATES)
def test_in_evaluation_a_token_depends_on_itself_alone(gate: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(16, 8, 4, gate=gate))
    x = torch.randn(2, 30, 16)
    layer(x)  # a running threshold has seen something
    layer.eval()
    whole = layer(x)
    torch.testing.assert_close(torch.cat([layer(x[:, i : i + 1]) for i in range(30)], 1), whole)


def test_running_threshold_is_the_mean_of_the_first_batches() -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(8, 8, 4, gate="batch_quantile", threshold=0.7, noise=0.0)).bfloat16()
    assert layer.gate.running_threshold.dtype == torch.float32
    layer.float()
    cuts = []
    for _ in range(3):
        layer(torch.randn(1, 9, 8))
        flat = layer.routing.gates.detach().flatten()
        cuts.append(torch.quantile(flat, 0.7, interpolation="lower"))
    torch.testing.assert_close(layer.gate.running_threshold, torch.stack(cuts).mean())
    layer.eval()(torch.randn(1, 9, 8))
    assert int(layer.gate.num_batches) == 3


@pytest.mark.parametrize("gate", GATES)
def test_pads_take_no_expert_and_change_nothing(gate: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(8, 8, 4, gate=gate, noise=0.0))
    x = torch.randn(1, 12, 8)
    want, loss = layer(x[:, :7]), layer.routing.balancing_loss
    got = layer(x, torch.arange(12).view(1, 12) < 7)
    torch.testing.assert_close(got[:, :7], want)
    torch.testing.assert_close(layer.routing.balancing_loss, loss)
    assert (got[:, 7:] == 0).all()
    assert (layer.num_active_experts[:, 7:] == 0).all()


def test_balancing_loss_is_1_where_experts_are_used_alike_and_e_where_one_is() -> None:
    gates = torch.full((6, 3), 1 / 3)
    assert expert_balancing_loss(gates, torch.eye(3).repeat(2, 1) > 0).item() == pytest.approx(1)
    one = functional.one_hot(torch.zeros(6, dtype=torch.int64), 3)
    assert expert_balancing_loss(one.float(), one > 0).item() == pytest.approx(3)
    half = torch.tensor([True, False]).repeat(3)
    alone = expert_balancing_loss(gates[half], one[half] > 0)
    torch.testing.assert_close(expert_balancing_loss(gates, one > 0, half), alone)


def test_noise_only_in_training_and_changes_which_experts() -> None:
    torch.manual_seed(0)
    layer = DynaMoE(8, 8, 6, gate="row_quantile", noise=0.5)
    x = torch.randn(1, 50, 8)
    layer(x)
    first = layer.routing.active
    layer(x)
    assert not torch.equal(first, layer.routing.active)
    assert torch.equal(layer.eval()(x), layer(x))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", GATES)
def test_forward_waits_for_no_device(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, where whoever asks for one gets an error; backward too."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # sizes as on a device
    with FakeTensorMode(), _Seen() as seen:
        layer = DynaMoE(16, 16, 4, gate=gate, gated=True, bias=True)
        x = torch.empty(2, 9, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, torch.empty(2, 9, dtype=torch.bool))
        (out.sum() + layer.routing.balancing_loss).backward()
    assert x.grad.shape == out.shape == x.shape
    assert not seen.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
    assert {"mor::route_threshold", "aten::_grouped_mm"} <= seen.names


@pytest.mark.parametrize("gate", GATES)
def test_compiled_equals_eager(gate: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(16, 8, 4, gate=gate, noise=0.0, bias=True))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 16)
    mask = torch.rand(2, 9) > 0.2
    for use in [mask] if gate != "mass" else [None, mask]:  # each is compiled
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = layer(one, use), compiled(other, use)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(other.grad, one.grad)
    assert torch.equal(compiled.num_active_experts, layer.num_active_experts)
    for (name, a), b in zip(layer.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_autocast_keeps_gates_in_float32(gate: str) -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(16, 8, 4, gate=gate, bias=True)).eval()
    x = torch.randn(2, 9, 16)
    want = layer(x)
    gates = layer.routing.gates
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(layer.routing.gates, gates)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_product_equals_a_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for sizes in ((16, 8), (5, 7)):  # the second are no multiple of 16 bytes
        x, weight = torch.randn(9, sizes[0], dtype=dtype), torch.randn(3, *sizes[::-1], dtype=dtype)
        out = grouped_linear(x, weight, torch.tensor([0, 4, 4, 7]))
        assert out.shape == (9, sizes[1])
        torch.testing.assert_close(out[:4], x[:4] @ weight[0].T)
        torch.testing.assert_close(out[4:7], x[4:7] @ weight[2].T)


def test_experts_with_biases_are_linear_layers() -> None:
    torch.manual_seed(0)
    experts = Experts(2, 4, 6, 3, bias=True, activation=torch.tanh)
    x = torch.randn(5, 4)
    out = experts(x, torch.tensor([0, 2, 5]))
    for e, rows in enumerate((slice(0, 2), slice(2, 5))):
        hidden = torch.tanh(functional.linear(x[rows], experts.up_proj[e], experts.up_bias[e]))
        want = functional.linear(hidden, experts.down_proj[e], experts.down_bias[e])
        torch.testing.assert_close(out[rows], want)


def test_copies_pickles_and_state() -> None:
    torch.manual_seed(0)
    layer = sharp(DynaMoE(8, 8, 4, gate="batch_quantile"))
    x = torch.randn(1, 9, 8)
    layer(x)
    other = DynaMoE(8, 8, 4, gate="batch_quantile")
    other.load_state_dict(layer.state_dict())
    want = layer.eval()(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other.eval()):
        assert twin.routing is None
        assert torch.equal(twin(x), want)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (3, 8), (2, 2, 2, 8)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    for gate in GATES:
        layer = DynaMoE(8, 8, 4, gate=gate)
        x = torch.randn(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == shape
        assert layer.num_active_experts.shape == shape[:-1]
        assert layer.routing.balancing_loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"gate": "top"}, "gate: expected one of .*'mass'.*, got 'top'"),
        ({"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"min_k": 5}, "min_k: expected 0 to num_experts = 4 experts, got 5"),
        ({"min_k": 3, "max_k": 2}, r"max_k: expected None or at least 3 \(min_k = 3\), got 2"),
        ({"noise": -1.0}, "noise: expected a number of at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynaMoE(8, 8, **{"num_experts": 4, **options})


def test_bad_input() -> None:
    layer = DynaMoE(8, 8, 4)
    with pytest.raises(ValueError, match=r"DynaMoE: expected hidden of shape \[B, S, 8\], got"):
        layer(torch.randn(1, 2, 7))
    with pytest.raises(ValueError, match=r"token_mask: expected shape \[1, 2\], got \[2\]"):
        layer(torch.randn(1, 2, 8), torch.ones(2))
    with pytest.raises(RuntimeError, match="NaN"):
        layer(torch.full((1, 2, 8), torch.nan))
