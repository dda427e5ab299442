import pytest
import torch
from simt import Kernels
from torch import Tensor

from mor.ops.scatter_tokens import reference
from mor.testing import assert_close_to_reference

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


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_gather_tokens_backward(
    kernels: Kernels, sizes: tuple[int, int, int], dtype: torch.dtype, order: str
) -> None:
    base, grad, rows, *_ = make(sizes, dtype, order, 0)
    got = torch.empty(base.shape, dtype=dtype)
    scratch = torch.empty(2 * sizes[0], dtype=torch.int32)
    kernels.call(
        "gather_tokens_backward", dtype, grad, grad.stride(0), rows, got, scratch,
        sizes[0], rows.shape[0], sizes[2],
    )  # fmt: skip
    zeros = torch.zeros_like(base)
    exact = reference(zeros.double(), grad.double(), rows)
    check("grad_x", got, exact.to(dtype), exact)


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
    float_factors = 1 if scaled else 2
    base, updates, rows, gate, scale = make(sizes, dtype, order, float_factors)
    scales = scale if scaled else None
    wide = scale.double() if scaled else None
    exact = reference(base.double(), updates.double(), rows, gate.double(), wide)
    out = base if in_place else torch.empty(base.shape, dtype=dtype)
    scratch, padding = torch.empty(2 * sizes[0], dtype=torch.int32), padding_of(base)
    kernels.call(
        "scatter_tokens", dtype, out, out.stride(0), base, base.stride(0), updates,
        updates.stride(0), rows, gate, scales, float_factors, scratch, sizes[0], rows.shape[0],
        sizes[2],
    )  # fmt: skip
    check("out", out, exact.to(dtype), exact)
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
    num_rows, num_hits, width = sizes
    base, updates, rows, gate, scale = make(sizes, dtype, "any", 3)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(1 if expanded else num_rows, width, generator=generator).to(dtype)
    grad = row.expand(num_rows, width)
    leaves = [t.double().requires_grad_() for t in (base, updates, gate, scale)]
    out = reference(leaves[0], leaves[1], rows, leaves[2], leaves[3] if scaled else None)
    exact = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
    got = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (base, updates, gate, scale)]
    wanted = (True, True, True, True) if scaled else (False, True, True, False)
    outputs = [g if w else None for g, w in zip(got, wanted, strict=True)]
    kernels.call(
        "scatter_tokens_backward", dtype, grad, grad.stride(0), base if scaled else None,
        base.stride(0), updates, updates.stride(0), rows, gate, scale if scaled else None, 3,
        *outputs, num_rows, num_hits, width,
    )  # fmt: skip
    names = ("base", "updates", "gate", "base_scale")
    for name, mine, high, want in zip(names, got, exact, wanted, strict=True):
        if want:
            check(f"gradient of {name}", mine, high.to(mine.dtype), high)
