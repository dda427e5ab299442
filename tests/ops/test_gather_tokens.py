import pytest
import torch
from torch import Tensor

from mor.ops import gather_tokens
from tests.cases.gather_tokens import CASES, case, make_rows
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
def test_gather_tokens(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        for width in (5, 15, 17, 65, 100, 200):
            check_op(case(125, 61, width, "ascending"), dtype)
            check_op(case(125, 61, width, "falling-repeats"), dtype)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_past_the_cache_is_streamed_right(dtype: torch.dtype) -> None:
    # Above 12 MiB the kernels write around the cache, here with two threads' ranges meeting.
    x = torch.randn(20011, 512).to(dtype).requires_grad_()
    rows = make_rows(20011, 18001, "ascending", torch.Generator().manual_seed(3))
    y = gather_tokens(x, rows)
    assert torch.equal(y, x[rows])
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got, torch.zeros_like(x).index_copy(0, rows, grad))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(9,), (9, 3), (9, 2, 3), (9, 0, 2)], ids=str)
def test_any_dtype_and_trailing_dimensions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 2, shape).to(dtype)
    rows = torch.tensor([8, 0, 3, 3])
    assert torch.equal(gather_tokens(x, rows), x[rows])
    assert torch.equal(gather_tokens(x.expand(2, *shape)[1], rows), x[rows])


def test_columns_and_expanded_rows() -> None:
    x, rows = torch.randn(6, 9), torch.tensor([1, 5])
    assert torch.equal(gather_tokens(x.t(), rows), x.t()[rows])
    assert torch.equal(gather_tokens(x[:1].expand(6, 9), rows), x[:1].expand(6, 9)[rows])
    assert torch.equal(gather_tokens(x[:, 2], rows), x[rows, 2])
    assert torch.equal(gather_tokens(x, torch.tensor([1, 9, 5])[::2]), x[rows])


def test_sums_of_many_repeats_are_rounded_once() -> None:
    grad = torch.rand(4000, 8).bfloat16()
    rows = torch.arange(4000) % 3
    got = torch.ops.mor.gather_tokens_backward(grad, rows, 3)
    exact = torch.zeros(3, 8, dtype=torch.float64).index_add(0, rows, grad.double())
    assert_close_to_reference("grad_x", got, exact.bfloat16(), exact)


@pytest.mark.unsanitized
def test_compiles_forward_and_backward() -> None:
    def loss(x: Tensor, rows: Tensor) -> Tensor:
        return gather_tokens(x * 2, rows).sin().sum()

    rows = torch.tensor([4, 1, 1])
    x = torch.randn(6, 8, requires_grad=True)
    got = torch.compile(loss, fullgraph=True)(x, rows)
    want = loss(x, rows)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input() -> None:
    op, x, rows = torch.ops.mor.gather_tokens, torch.randn(4, 3), torch.tensor([0, 3])
    check_bad_input(r"gather_tokens: expected x of shape \[N, D\], got \[4\]", op, x[:, 0], rows)
    check_bad_input(r"expected rows of shape \[K\], got \[1, 2\]", op, x, rows[None])
    check_bad_input("expected rows of dtype int64, got int32", op, x, rows.int())
    check_bad_input("expected rows on cpu, got meta", op, x, rows.to("meta"), fake=False)
    for bad in (4, -1, 2**40):
        check_bad_input(
            rf"gather_tokens: expected rows in \[0, 4\), got rows\[1\] = {bad}",
            op, x, torch.tensor([0, bad, 2]), fake=False,
        )  # fmt: skip
    check_bad_input(r"rows in \[0, 0\)", op, x[:0], torch.tensor([0]), fake=False)


def test_bad_input_of_backward() -> None:
    op, grad, rows = torch.ops.mor.gather_tokens_backward, torch.randn(2, 3), torch.tensor([0, 3])
    name = "gather_tokens_backward"
    check_bad_input(rf"{name}: expected grad of shape \[K, D\]", op, grad[0], rows, 4)
    check_bad_input("expected grad of dtype float32", op, grad.long(), rows, 4)
    check_bad_input("expected grad of 1 rows", op, grad, rows[:1], 4)
    check_bad_input("expected rows of dtype int64, got float32", op, grad, rows.float(), 4)
    check_bad_input("expected num_rows >= 0, got -1", op, grad, rows, -1)
    check_bad_input(rf"{name}: .*\[0, 3\), got rows\[1\] = 3", op, grad, rows, 3, fake=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_gather_tokens_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
