"""scatter_tokens: values, gradients, in place, bad input."""

import pytest
import torch
from torch import Tensor

from mor.ops import scatter_tokens, scatter_tokens_
from mor.ops.scatter_tokens import reference
from tests.cases.scatter_tokens import (
    CASES,
    IN_PLACE_CASES,
    MIXED_CASES,
    case,
    in_place,
    make_inputs,
)
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    assert_close_to_reference,
    check_op,
    instruction_set,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_scatter_tokens(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", IN_PLACE_CASES, ids=lambda c: c.id)
def test_scatter_tokens_in_place(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op_case", MIXED_CASES, ids=lambda c: c.id)
def test_float32_factors(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


def test_float32_factors_of_float64() -> None:
    leaves = make_inputs((9, 30, 5), "falling-repeats", "float32", "float32", torch.float64)
    rows = leaves.pop("rows")
    wide = {name: t.double().requires_grad_() for name, t in leaves.items()}
    for t in leaves.values():
        t.requires_grad_()
    got, want = scatter_tokens(rows=rows, **leaves), reference(rows=rows, **wide)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got.sin().sum(), list(leaves.values()))
    exact = torch.autograd.grad(want.sin().sum(), list(wide.values()))
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        for width in (5, 15, 17, 65, 100, 200):
            check_op(case((125, 61, width), "ascending"), dtype)
            check_op(case((125, 61, width), "falling-repeats", "same", "same"), dtype)
            check_op(case((125, 61, width), "unsorted", op=in_place), dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_not_a_number_survive_rounding(isa: str, dtype: torch.dtype) -> None:
    # No subnormals: the instruction that rounds to bfloat16 on avx512_bf16 makes them zero.
    special = [
        float("inf"),
        float("-inf"),
        float("nan"),
        0.0,
        -0.0,
        2e-38,
        3e38,
        1 + 2**-8,
        1 - 2**-9,
    ]
    updates = torch.tensor(special * 5, dtype=torch.float64).to(dtype)[None]  # at odd places too
    base = torch.zeros_like(updates)
    with instruction_set(isa):
        got = scatter_tokens(base, updates, torch.tensor([0]), torch.ones(1))
    assert torch.equal(got.nan_to_num(123.0), updates.nan_to_num(123.0))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_ties_round_to_even(isa: str) -> None:
    gates = 1 + torch.tensor([1, 3, -1, -3]) * 2**-8  # between two bfloat16
    ones = torch.ones(4, 37, dtype=torch.bfloat16)
    with instruction_set(isa):
        got = scatter_tokens(torch.zeros_like(ones), ones, torch.arange(4), gates)
    assert torch.equal(got, gates.bfloat16()[:, None].expand(4, 37))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_past_the_cache_is_streamed_right(dtype: torch.dtype) -> None:
    # Above 12 MiB the kernels write around the cache.
    inputs = make_inputs((20011, 9001, 512), "ascending", scale="none", dtype=dtype)
    got = scatter_tokens(**inputs)
    exact = {
        n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    torch.testing.assert_close(got, reference(**exact).to(dtype))
    assert torch.equal(in_place(**inputs), got)


@pytest.mark.parametrize("scale", ["same", "none"])
@pytest.mark.parametrize(
    "names", [("base",), ("updates",), ("gate",), ("base", "gate"), ("base_scale", "updates")]
)
def test_only_the_gradients_asked_for(names: tuple[str, ...], scale: str) -> None:
    names = names if scale == "same" else tuple(n for n in names if n != "base_scale")
    inputs = make_inputs((9, 14, 6), "falling-repeats", "same", scale, torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return scatter_tokens(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


def test_backward_computes_nothing_else() -> None:
    grad, rows = torch.randn(5, 4), torch.tensor([1, 3])
    backward = torch.ops.mor.scatter_tokens_backward
    for t in backward(grad, None, None, rows, torch.rand(2), torch.rand(5), False, False):
        assert t.shape == (0,)
    every = backward(grad, grad, grad[:2], rows, torch.rand(2), torch.rand(5), True, True)
    assert [list(t.shape) for t in every] == [[5, 4], [2, 4], [2], [5]]
    # Unscaled, the gradient of base is grad itself, and grad may be expanded from one element.
    base = torch.zeros(5, 4, requires_grad=True)
    one = torch.ones(()).expand(5, 4)
    (grad_base,) = torch.autograd.grad(scatter_tokens(base, grad[:2], rows), base, one)
    assert grad_base.data_ptr() == one.data_ptr()


def test_what_no_gradient_needs_is_not_saved() -> None:
    base, updates = torch.randn(5, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    rows, saved = torch.tensor([1, 3]), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        scatter_tokens(base, updates, rows, torch.rand(2))
    assert all(t.data_ptr() not in (base.data_ptr(), updates.data_ptr()) for t in saved)


def test_in_place_touches_only_its_rows() -> None:
    larger = torch.full((20, 30), 7.0)
    scatter_tokens_(larger[2:12:2, 3:20], torch.ones(2, 17), torch.tensor([4, 0]))
    want = torch.full((20, 30), 7.0)
    want[[2, 10], 3:20] = 8
    assert torch.equal(larger, want)
    columns = torch.zeros(4, 6)
    scatter_tokens_(columns.t(), torch.ones(2, 4), torch.tensor([5, 5]))
    assert torch.equal(columns[:, 5], torch.full((4,), 2.0))
    assert columns.sum() == 8


def test_rows_whole_chunks_apart_whose_width_is_odd() -> None:
    """Wide accesses would be possible, and would write what lies between the rows."""
    inputs = make_inputs((7, 5, 33), "falling-repeats")
    want = scatter_tokens(**inputs)
    memory = {name: torch.full((len(inputs[name]), 48), 7.0) for name in ("base", "updates")}
    for name, wider in memory.items():
        inputs[name] = wider[:, :33].copy_(inputs[name])
    assert torch.equal(scatter_tokens(**inputs), want)
    assert torch.equal(scatter_tokens_(**inputs), want)
    assert memory["base"][:, 33:].eq(7).all()


def test_gradient_expanded_over_rows() -> None:
    inputs = make_inputs((9, 30, 65), "falling-repeats")
    base, updates, rows, gate, scale = inputs.values()
    row = torch.randn(1, 65)
    got, want = (
        torch.ops.mor.scatter_tokens_backward(g, base, updates, rows, gate, scale, True, True)
        for g in (row.expand(9, 65), row.repeat(9, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_in_place_refuses_gradients() -> None:
    base, updates, rows = torch.zeros(4, 3), torch.ones(1, 3), torch.tensor([2])
    gate, scale = torch.ones(1), torch.ones(4)
    for i, name in ((0, "base"), (1, "updates"), (3, "gate"), (4, "base_scale")):
        args = [base, updates, rows, gate, scale]
        args[i] = args[i].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"scatter_tokens_: .* got {name} with"):
            scatter_tokens_(*args)
    with torch.no_grad():
        scatter_tokens_(base.requires_grad_(), updates, rows, gate, scale)
    assert base.sum() == 3


def test_opcheck_of_the_other_operators() -> None:
    inputs = tuple(make_inputs((9, 7, 5), "repeated").values())
    torch.library.opcheck(torch.ops.mor.scatter_tokens_.default, inputs)
    args = (torch.randn(9, 5), *inputs, True, True)
    torch.library.opcheck(torch.ops.mor.scatter_tokens_backward.default, args)


@pytest.mark.unsanitized
def test_compiles_forward_and_backward() -> None:
    def loss(base: Tensor, updates: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
        return scatter_tokens(base * 2, updates, rows, gate, scale.sin()).sin().sum()

    inputs = make_inputs((6, 8, 9), "falling-repeats")
    rows = inputs.pop("rows")
    leaves = [t.requires_grad_() for t in inputs.values()]
    got, want = torch.compile(loss, fullgraph=True)(*leaves), loss(*leaves)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(value, leaves) for value in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.unsanitized
def test_in_place_compiles() -> None:
    @torch.compile(fullgraph=True)
    def function(base: Tensor, updates: Tensor, rows: Tensor) -> Tensor:
        scatter_tokens_(base, updates, rows)
        return base * 2

    base = torch.zeros(4, 8)
    assert function(base, torch.ones(2, 8), torch.tensor([1, 1])).sum() == 32
    assert base.sum() == 16


def test_many_repeats_are_rounded_once() -> None:
    updates, rows = torch.rand(4000, 8).bfloat16(), torch.arange(4000) % 3
    base = torch.rand(3, 8).bfloat16()
    exact = base.double().index_add(0, rows, updates.double())
    got = scatter_tokens(base, updates, rows)
    assert_close_to_reference("out", got, exact.bfloat16(), exact)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES + IN_PLACE_CASES, ids=lambda c: c.id)
def test_scatter_tokens_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
