import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_gather_tokens import CASES as GATHER_CASES
from test_scatter_tokens import CASES, MIXED_CASES
from torch import Tensor

from mor.ops.scatter_tokens import reference
from tests.support.operators import assert_close_to_reference

CASES_BY_ID = in_harness([*CASES, *MIXED_CASES])
GATHER_CASES_BY_ID = in_harness(GATHER_CASES)
SIZES = {
    "one": (1, 1, 1),
    "odd": (7, 5, 33),
    "16-byte": (40, 25, 64),
    "wide": (9, 12, 520),
    "none-hit": (3, 0, 4),
    "repeats-far-apart": (5, 90, 24),
}
DTYPES = [torch.float32, torch.bfloat16]
OTHERS = [torch.float16, torch.float64]
SHAPES = [
    pytest.param(sizes, dtype, id=f"{name}-{dtype}")
    for name, sizes in SIZES.items()
    for dtype in (DTYPES + OTHERS if name == "16-byte" else DTYPES)
]


def make(
    sizes: tuple[int, int, int], dtype: torch.dtype, order: str, float_factors: int
) -> tuple[Tensor, ...]:
    num_rows, num_hits, width = sizes
    generator = torch.Generator().manual_seed(0)
    if order == "ascending":
        rows = torch.arange(min(num_hits, num_rows))
    else:
        rows = torch.randint(0, num_rows, (num_hits,), generator=generator)
    num_hits = rows.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def matrix(num: int, padding: int) -> Tensor:
        """Rows that are a whole number of 16-byte chunks apart, however long they are."""
        return normal(num, width + -width % 8 + padding).to(dtype)[:, :width]

    gate, scale = normal(num_hits), normal(num_rows)
    return (
        matrix(num_rows, 8),
        matrix(num_hits, 16),
        rows,
        gate.float() if float_factors & 1 else gate.to(dtype),
        scale.float() if float_factors & 2 else scale.to(dtype),
    )


def padding_of(matrix: Tensor) -> Tensor:
    """A copy of what lies between the rows of one of `make`."""
    between = matrix.stride(0) - matrix.shape[1]
    shape, first = (matrix.shape[0], between), matrix.shape[1]
    return torch.as_strided(matrix, shape, matrix.stride(), first).clone()


def check(name: str, got: Tensor, low: Tensor, high: Tensor) -> None:
    assert_close_to_reference(name, got, low, high, factor=3.0)


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def float_factors(*factors: Tensor | None) -> int:
    """What the kernels are told: 1 the gate is float, 2 base_scale is."""
    is_float = [t is not None and t.dtype == torch.float32 for t in factors]
    return is_float[0] + 2 * is_float[1]


def check_gather_backward(kernels: Kernels, grad: Tensor, rows: Tensor, num_rows: int) -> None:
    dtype, width = grad.dtype, grad.shape[1]
    got = torch.empty(num_rows, width, dtype=dtype)
    scratch = torch.empty(2 * num_rows, dtype=torch.int32)
    kernels.call(
        "gather_tokens_backward", dtype, grad, grad.stride(0), rows, got, scratch,
        num_rows, len(rows), width,
    )  # fmt: skip
    exact = reference(torch.zeros(num_rows, width).double(), grad.double(), rows)
    check("grad_x", got, exact.to(dtype), exact)


def check_forward(
    kernels: Kernels,
    base: Tensor,
    updates: Tensor,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    in_place: bool,
) -> None:
    (num_rows, width), dtype = base.shape, base.dtype
    exact = reference(base.double(), updates.double(), rows, wide(gate), wide(base_scale))
    out = base if in_place else torch.empty(base.shape, dtype=dtype)
    kernels.call(
        "scatter_tokens", dtype, out, out.stride(0), base, base.stride(0), updates,
        updates.stride(0), rows, gate, base_scale, float_factors(gate, base_scale),
        torch.empty(2 * num_rows, dtype=torch.int32), num_rows, len(rows), width,
    )  # fmt: skip
    check("out", out, exact.to(dtype), exact)


def check_backward(
    kernels: Kernels,
    base: Tensor,
    updates: Tensor,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    grad: Tensor,
) -> None:
    operands = {"base": base, "updates": updates, "gate": gate, "base_scale": base_scale}
    leaves = {n: t.double().requires_grad_() for n, t in operands.items() if t is not None}
    wanted = [n for n in leaves if n != "base" or base_scale is not None]
    exact = torch.autograd.grad(
        reference(rows=rows, **leaves), [leaves[n] for n in wanted], grad.double()
    )
    got = {n: torch.full(leaves[n].shape, torch.nan, dtype=operands[n].dtype) for n in wanted}
    kernels.call(
        "scatter_tokens_backward", grad.dtype, grad, grad.stride(0),
        None if base_scale is None else base, base.stride(0), updates, updates.stride(0), rows,
        gate, base_scale, float_factors(gate, base_scale), *map(got.get, operands), len(base),
        len(rows), base.shape[1],
    )  # fmt: skip
    for name, want in zip(wanted, exact, strict=True):
        check(f"gradient of {name}", got[name], want.to(got[name].dtype), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GATHER_CASES_BY_ID)
def test_table_of_the_cpu_for_gather_tokens_backward(
    kernels: Kernels, case: str, dtype: torch.dtype
) -> None:
    inputs = inputs_of(GATHER_CASES_BY_ID[case], dtype)
    x, rows = inputs["x"], inputs["rows"]
    grad = torch.randn(len(rows), x.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    check_gather_backward(kernels, grad, rows, len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES_BY_ID[case], dtype)
    grad = torch.randn(inputs["base"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_backward(kernels, **inputs, grad=grad)
    for in_place in (False, True):  # the latter overwrites base
        check_forward(kernels, **inputs, in_place=in_place)


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_gather_tokens_backward(
    kernels: Kernels, sizes: tuple[int, int, int], dtype: torch.dtype, order: str
) -> None:
    base, grad, rows, *_ = make(sizes, dtype, order, 0)
    check_gather_backward(kernels, grad, rows, len(base))


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_scatter_tokens(
    kernels: Kernels,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    scaled: bool,
    in_place: bool,
    order: str,
) -> None:
    base, updates, rows, gate, scale = make(sizes, dtype, order, 1 if scaled else 2)
    padding = padding_of(base)
    check_forward(kernels, base, updates, rows, gate, scale if scaled else None, in_place)
    assert torch.equal(padding_of(base), padding), "base was written to beyond its width"


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_scatter_tokens_backward(
    kernels: Kernels,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    scaled: bool,
    expanded: bool,
) -> None:
    num_rows, _, width = sizes
    base, updates, rows, gate, scale = make(sizes, dtype, "any", 3)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(1 if expanded else num_rows, width, generator=generator).to(dtype)
    grad = row.expand(num_rows, width)
    check_backward(kernels, base, updates, rows, gate, scale if scaled else None, grad)
