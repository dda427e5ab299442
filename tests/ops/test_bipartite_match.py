from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mor.ops import bipartite_match
from mor.ops.bipartite_match import reference
from tests.cases.bipartite_match import CASES, LENGTHS, METRICS, make_inputs
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
    packed,
)


def check_index(inputs: dict[str, Any], metric: str) -> None:
    """The chosen row is as similar as the best one, in float64 and up to the rounding of sums."""
    scores, index = bipartite_match(**inputs, metric=metric)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    want, where = reference(**wide, metric=metric)
    found = where >= 0
    assert torch.equal(index >= 0, found)
    assert torch.equal(scores[~found], want[~found].to(scores.dtype))
    a, b = wide["a"][found], wide["b"][index[found]]
    mine = (a * b).sum(1)
    if metric == "cosine":
        mine = mine / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)
    near = 1e-12 if scores.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mine, want[found], rtol=near, atol=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_bipartite_match(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)
    inputs = op_case.make(dtype, "cpu", torch.Generator().manual_seed(2))
    check_index(inputs, inputs.pop("metric"))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with instruction_set(isa):
        for lengths in LENGTHS:
            for width in (1, 33, 257, 520, 600):
                for metric in METRICS:
                    check_index(make_inputs(lengths, width, "random", dtype, generator), metric)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smaller_of_equals_wins(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with instruction_set(isa):
        for lengths in LENGTHS:
            for width in (1, 2, 33):
                for values in ("integers", "equal"):
                    inputs = make_inputs(lengths, width, values, dtype, generator)
                    got, want = (
                        bipartite_match(**inputs, metric="dot"),
                        reference(**inputs, metric="dot"),
                    )
                    assert torch.equal(got[0], want[0])
                    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_are_equally_similar_wherever_they_lie(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 77, generator=generator).to(dtype)
    b = rows.repeat(40, 1)
    a = torch.randn(150, 77, generator=generator).to(dtype)
    args = packed([150]), packed([200])
    with instruction_set(isa):
        _, index = bipartite_match(a, b, *args)
        assert index.max() < 5
        scores, _ = bipartite_match(a[:1].expand(150, 77), b, *args)
        assert scores.unique().numel() == 1


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_infinities_and_not_a_number(isa: str, dtype: torch.dtype) -> None:
    zero, one, nan = torch.zeros(3), torch.tensor([1.0, 2.0, 2.0]), torch.full((3,), torch.nan)
    a, b = torch.stack([zero, one, nan, -one]).to(dtype), torch.stack([nan, zero, one]).to(dtype)
    args = packed([4]), packed([3])
    with instruction_set(isa):
        scores, index = bipartite_match(a, b, *args)
        assert index.tolist() == [1, 2, -1, 1]
        torch.testing.assert_close(scores.float(), torch.tensor([0.0, 1.0, -torch.inf, 0.0]))
        _, index = bipartite_match(a, b[:1], packed([4]), packed([1]))
        assert index.tolist() == [-1] * 4
        infinite = torch.tensor([[torch.inf, 0.0, 1.0]], dtype=dtype)
        scores, index = bipartite_match(a[1:2], infinite, packed([1]), packed([1]), "dot")
        assert (scores.item(), index.item()) == (torch.inf, 0)
        scores, index = bipartite_match(a[1:2], -infinite, packed([1]), packed([1]), "dot")
        assert (scores.item(), index.item()) == (-torch.inf, -1)


def test_gradients_of_rows_without_a_partner_and_of_zeros() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 4.0]], requires_grad=True)
    b = torch.tensor([[0.0, 0.0], [0.0, 2.0]], requires_grad=True)
    scores, index = bipartite_match(a, b, packed([2, 1]), packed([2, 0]))
    assert index.tolist() == [0, 1, -1]
    scores.masked_fill(index < 0, 0).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, torch.tensor([[0, 0], [-1, 1], [0, 0]]) * 0.5**1.5)
    torch.testing.assert_close(b.grad, torch.tensor([[0, 0], [1.0, 0]]) * 0.5**1.5)
    empty = torch.zeros(0, 2, requires_grad=True)
    scores, _ = bipartite_match(a, empty, packed([3]), packed([0]))
    for grad in torch.autograd.grad(scores, (a, empty), torch.ones(3)):
        assert grad.eq(0).all()


def test_one_sided_gradients() -> None:
    inputs = make_inputs("tome", 6, "random", torch.float64, torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        leaf = inputs[name].requires_grad_()
        bipartite_match(**inputs)[0].sum().backward()
        want = reference(**{**inputs, name: leaf})[0].sum()
        (grad,) = torch.autograd.grad(want, leaf)
        torch.testing.assert_close(leaf.grad, grad)
        inputs[name] = inputs[name].detach()


def test_strides_change_no_bit_of_the_gradients() -> None:
    inputs = make_inputs("tome", 33, "random", torch.float32, torch.Generator().manual_seed(0))
    strided = {n: torch.zeros(len(inputs[n]), 66)[:, ::2].copy_(inputs[n]) for n in ("a", "b")}
    grads = []
    for rows in (strided, {n: inputs[n] for n in strided}):
        leaves = {n: t.requires_grad_() for n, t in rows.items()}
        scores, _ = bipartite_match(**inputs | leaves)
        grads.append(torch.autograd.grad(scores.sum(), list(leaves.values())))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.unsanitized
def test_memory_is_of_the_order_of_the_rows() -> None:
    a, b = torch.randn(6000, 16), torch.randn(6000, 16)
    args = a, b, packed([6000]), packed([6000])
    with torch.profiler.profile(profile_memory=True) as profile:
        bipartite_match(*args)
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert taken <= 6000 * 12 + 4096  # the results; the matrix would be 144 MB


@pytest.mark.unsanitized
@pytest.mark.parametrize("metric", METRICS)
def test_compiles_forward_and_backward(metric: str) -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        scores, index = bipartite_match(a * 2, b, packed_a, packed_b, metric)
        return (scores * index).sin().sum()

    inputs = make_inputs("tome", 8, "random", torch.float32, torch.Generator().manual_seed(0))
    packed_a, packed_b = inputs["cu_seqlens_a"], inputs["cu_seqlens_b"]
    leaves = [inputs["a"].requires_grad_(), inputs["b"].requires_grad_()]
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(value, leaves) for value in (got, want))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


A, B, CU = torch.zeros(5, 3), torch.zeros(4, 3), packed([3, 2])
CU_B = packed([3, 1])
BAD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "a-rank": (r"a of shape \[Na, D\], got \[5\]", {"a": A[:, 0]}),
    "a-dtype": ("a of dtype float32, .*, got int64", {"a": A.long()}),
    "b-rank": (r"b of shape \[Nb, D\], got \[1, 4, 3\]", {"b": B[None]}),
    "b-dtype": ("b of dtype float32, got float16", {"b": B.half()}),
    "b-width": (r"b of width 3 \(that of a\), got \[4, 2\]", {"b": B[:, 1:]}),
    "cu-a-rank": (r"cu_seqlens_a of shape \[B \+ 1\], got \[\]", {"cu_seqlens_a": CU[0]}),
    "cu-a-dtype": ("cu_seqlens_a of dtype int32, got int64", {"cu_seqlens_a": CU.long()}),
    "cu-a-empty": ("cu_seqlens_a of at least one element", {"cu_seqlens_a": CU[:0]}),
    "cu-b-dtype": ("cu_seqlens_b of dtype int32, got float32", {"cu_seqlens_b": CU_B.float()}),
    "cu-b-size": (r"cu_seqlens_b of 3 elements .*got \[2\]", {"cu_seqlens_b": CU_B[:2]}),
    "metric": ("metric cosine or dot, got l2", {"metric": "l2"}),
}
BAD_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "a-start": ("cu_seqlens_a to start at 0, got 1", {"cu_seqlens_a": CU + 1}),
    "a-end": (r"cu_seqlens_a to end at 5 .*got 4", {"cu_seqlens_a": packed([3, 1])}),
    "b-end": (r"cu_seqlens_b to end at 4 .*got 5", {"cu_seqlens_b": packed([3, 2])}),
    "b-falls": (
        "cu_seqlens_b never to fall, got 6 then 4 at 2",
        {"cu_seqlens_b": torch.tensor([0, 6, 4]).int()},
    ),
}


@pytest.mark.parametrize("name", [*BAD_SHAPES, *BAD_VALUES])
def test_bad_input(name: str) -> None:
    message, change = {**BAD_SHAPES, **BAD_VALUES}[name]
    inputs = {"a": A, "b": B, "cu_seqlens_a": CU, "cu_seqlens_b": CU_B, **change}
    check_bad_input(
        "bipartite_match: expected " + message, bipartite_match, **inputs, fake=name in BAD_SHAPES
    )


@pytest.mark.parametrize("operand", ["b", "cu_seqlens_a", "cu_seqlens_b"])
def test_operands_of_two_devices_are_refused(operand: str) -> None:
    with FakeTensorMode():
        inputs = {
            "a": torch.zeros(5, 3, device="cuda"),
            "b": torch.zeros(4, 3, device="cuda"),
            "cu_seqlens_a": torch.zeros(3, dtype=torch.int32, device="cuda"),
            "cu_seqlens_b": torch.zeros(3, dtype=torch.int32, device="cuda"),
        }
        inputs[operand] = inputs[operand].to("cpu")
        message = f"bipartite_match: expected {operand} on cuda:0, got cpu"
        with pytest.raises(RuntimeError, match=message):
            bipartite_match(**inputs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_bipartite_match_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
    inputs = op_case.make(dtype, "cuda", torch.Generator().manual_seed(2))
    check_index(inputs, inputs.pop("metric"))
