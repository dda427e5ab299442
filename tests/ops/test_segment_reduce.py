from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import gather_tokens, segment_reduce
from mor.ops.segment_reduce import reference
from tests.cases.segment_reduce import CASES, MIXED_CASES, REDUCES, case
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    assert_close_to_reference,
    check_bad_input,
    check_op,
    instruction_set,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_segment_reduce(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op_case", MIXED_CASES, ids=lambda c: c.id)
def test_float32_weights(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        for width in (5, 17, 100, 200):
            for reduce in REDUCES:
                check_op(case((125, 61, width), "any", reduce), dtype)
            check_op(case((125, 61, width), "sorted", "mean", "same"), dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_of_special_values(isa: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4  # a subnormal
    column = [-torch.inf, -1.0, tiny, -tiny, torch.inf, torch.nan, 2.0, torch.nan, 3.0, torch.nan]
    x = torch.tensor(column, dtype=dtype)[:, None].expand(10, 37).contiguous().requires_grad_()
    segments = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, 4, 4])
    with instruction_set(isa):
        out = segment_reduce(x, segments, 6, "amax")
        out.sum().backward()
    want = torch.tensor([-1.0, tiny, torch.inf, torch.nan, torch.nan, 0.0], dtype=dtype)
    assert torch.equal(out.nan_to_num(7.0, 8.0), want.nan_to_num(7.0, 8.0)[:, None].expand(6, 37))
    assert x.grad is not None
    assert torch.equal(
        x.grad, torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 0, 1])[:, None].expand(10, 37).to(dtype)
    )


def test_amax_gradient_goes_to_the_first_of_equals() -> None:
    x = torch.tensor([[1.0], [3.0], [3.0], [0.0], [-0.0]], requires_grad=True)
    segment_reduce(x, torch.tensor([0, 0, 0, 1, 1]), 2, "amax").sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1, 0, 1, 0]


def test_weights_that_cancel_give_a_mean_of_zero() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -1.0, 0.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 0, 1, 2, 2])
    out = segment_reduce(x, segments, 3, "mean", weights)
    assert out[:2].eq(0).all()
    torch.testing.assert_close(out[2], (2 * x[3] + x[4]) / 3)
    out.sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert x.grad[:3].eq(0).all()
    assert weights.grad[:3].eq(0).all()


def test_the_unmerge_is_a_gather() -> None:
    x, segments = torch.randn(6, 4), torch.tensor([2, 0, 2, 1, 0, 0])
    merged = segment_reduce(x, segments, 3, "mean")
    back = gather_tokens(merged, segments)
    torch.testing.assert_close(back[[0, 2]], x[[0, 2]].mean(0).expand(2, 4))
    assert torch.equal(segment_reduce(back, segments, 3, "amax"), merged)


def test_many_rows_are_rounded_once() -> None:
    x, segments = torch.rand(4000, 8).bfloat16(), torch.arange(4000) % 3
    for reduce in ("sum", "mean"):
        exact = reference(x.double(), segments, 3, reduce)
        got = segment_reduce(x, segments, 3, reduce)
        assert_close_to_reference(reduce, got, exact.bfloat16(), exact)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_past_the_cache_is_streamed_right(dtype: torch.dtype) -> None:
    x, segments = torch.randn(21000, 512).to(dtype), torch.randint(0, 20011, (21000,))
    got = segment_reduce(x, segments, 20011, "mean")
    torch.testing.assert_close(got, reference(x, segments, 20011, "mean"))


@pytest.mark.parametrize("shape", [(9,), (9, 2, 3), (9, 0, 2)], ids=str)
def test_trailing_dimensions(shape: tuple[int, ...]) -> None:
    x, segments = torch.randn(shape), torch.arange(9) % 4
    for reduce in REDUCES:
        torch.testing.assert_close(
            segment_reduce(x, segments, 4, reduce), reference(x, segments, 4, reduce)
        )


@pytest.mark.parametrize("names", [("x",), ("weights",), ("x", "weights")])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_only_the_gradients_asked_for(reduce: str, names: tuple[str, ...]) -> None:
    inputs = case((14, 9, 6), "any", reduce, "same").make(
        torch.float64, "cpu", torch.Generator().manual_seed(1)
    )

    def function(*tensors: Tensor) -> Tensor:
        return segment_reduce(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


def test_what_no_gradient_needs_is_not_saved() -> None:
    x, saved = torch.randn(5, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        out = segment_reduce(x, torch.tensor([0, 1, 1, 0, 2]), 3, "mean", torch.rand(5))
    assert all(t.data_ptr() not in (x.data_ptr(), out.data_ptr()) for t in saved)


def test_opcheck_of_the_backward_of_amax() -> None:
    x, segments = torch.randn(9, 5), torch.arange(9) % 4
    out = segment_reduce(x, segments, 4, "amax")
    args = (torch.randn(4, 5), x, out, segments)
    torch.library.opcheck(torch.ops.mor.segment_reduce_amax_backward.default, args)


def test_gradient_expanded_over_segments() -> None:
    x, segments, row = torch.randn(9, 65), torch.arange(9) % 4, torch.randn(1, 65)
    out = segment_reduce(x, segments, 4, "amax")
    got, want = (
        torch.ops.mor.segment_reduce_amax_backward(grad, x, out, segments)
        for grad in (row.expand(4, 65), row.repeat(4, 1))
    )
    assert torch.equal(got, want)


@pytest.mark.unsanitized
@pytest.mark.parametrize("reduce", REDUCES)
def test_compiles_forward_and_backward(reduce: str) -> None:
    def loss(x: Tensor, weights: Tensor) -> Tensor:
        given = None if reduce == "amax" else weights * 2
        return segment_reduce(x * 2, segments, 3, reduce, given).sin().sum()

    segments = torch.tensor([2, 0, 2, 1, 0, 0])
    leaves = [torch.randn(6, 8, requires_grad=True), torch.rand(6, requires_grad=True)]
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(v, leaves, allow_unused=True) for v in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


X, SEGMENTS = torch.zeros(4, 3), torch.tensor([0, 2, 1, 0])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"x of shape \[N, D\], got \[4\]", {"x": X[:, 0]}),
        ("x of dtype float32, .*, got int64", {"x": X.long()}),
        (r"segments of shape \[N\], got \[1, 4\]", {"segments": SEGMENTS[None]}),
        ("segments of dtype int64, got int32", {"segments": SEGMENTS.int()}),
        (r"segments of 4 elements \(the rows of x\), got \[3\]", {"segments": SEGMENTS[:3]}),
        ("num_segments >= 0, got -1", {"num_segments": -1}),
        ("reduce sum, mean or amax, got max", {"reduce": "max"}),
        ("no weights with amax", {"reduce": "amax", "weights": torch.ones(4)}),
        (r"weights of shape \[N\], got \[4, 1\]", {"weights": torch.ones(4, 1)}),
        ("weights of dtype float32 or float32, got float16", {"weights": torch.ones(4).half()}),
        (r"weights of 4 elements, got \[5\]", {"weights": torch.ones(5)}),
        ("segments on cpu, got meta", {"segments": SEGMENTS.to("meta")}),
        ("weights on cpu, got meta", {"weights": torch.ones(4, device="meta")}),
        (r"segments in \[0, 2\), got segments\[1\] = 2", {"num_segments": 2}),
        (r"segments in \[0, 3\), got segments\[0\] = -1", {"segments": SEGMENTS - 1}),
        (r"segments in \[0, 0\), got segments\[0\] = 0", {"num_segments": 0}),
    ],
)  # fmt: skip
def test_bad_input(message: str, change: dict[str, Any]) -> None:
    inputs: dict[str, Any] = {
        "x": X, "segments": SEGMENTS, "num_segments": 3, "reduce": "sum", "weights": None, **change
    }  # fmt: skip
    fake = "segments in" not in message and "meta" not in message
    check_bad_input(
        "segment_reduce: expected " + message, torch.ops.mor.segment_reduce, **inputs, fake=fake
    )


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"grad of shape \[S, D\], got \[3\]", {"grad": X[:3, 0]}),
        ("grad of dtype float32, .*, got int32", {"grad": X[:3].int()}),
        (r"out of shape \[3, 3\], got \[2, 3\]", {"out": X[:2]}),
        ("out of dtype float32, got float16", {"out": X[:3].half()}),
        (r"x of shape \[4, 3\], got \[4, 2\]", {"x": X[:, 1:]}),
        ("x of dtype float32, got float64", {"x": X.double()}),
        ("segments of dtype int64, got int32", {"segments": SEGMENTS.int()}),
        ("segments of 4 elements", {"segments": SEGMENTS[:3]}),
        (r"segments in \[0, 3\), got segments\[1\] = 3", {"segments": SEGMENTS + 1}),
    ],
)
def test_bad_input_of_backward(message: str, change: dict[str, Any]) -> None:
    inputs = {"grad": X[:3], "x": X, "out": X[:3], "segments": SEGMENTS, **change}
    op = torch.ops.mor.segment_reduce_amax_backward
    fake = "segments in" not in message
    check_bad_input("segment_reduce_amax_backward: expected " + message, op, **inputs, fake=fake)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_segment_reduce_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
