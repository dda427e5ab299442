import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_segment_reduce import CASES, MIXED_CASES
from torch import Tensor

from mor.ops.segment_reduce import reference
from tests.support.operators import assert_close_to_reference

CASES_BY_ID = in_harness([*CASES, *MIXED_CASES])
REDUCES = ("sum", "mean", "amax")
SIZES = {
    "one": (1, 1, 1),
    "odd": (7, 5, 33),
    "16-byte": (40, 25, 64),
    "wide": (12, 9, 520),
    "empty-segments": (5, 12, 24),
    "one-segment": (90, 1, 24),
    "no-rows": (0, 3, 4),
    "no-columns": (4, 3, 0),
}
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(sizes, dtype, id=f"{name}-{dtype}")
    for name, sizes in SIZES.items()
    for dtype in ([*DTYPES, torch.float16, torch.float64] if name == "16-byte" else DTYPES)
]


def make(
    sizes: tuple[int, int, int], dtype: torch.dtype, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_segments, width = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    segments = torch.randint(0, num_segments, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5
    return (x.round() if rounded else x).to(dtype), segments, weights.to(dtype)


def reduced(
    kernels: Kernels,
    x: Tensor,
    segments: Tensor,
    num_segments: int,
    reduce: str,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.full((num_segments, x.shape[1]), float("nan"), dtype=x.dtype)
    totals = torch.full((num_segments,), float("nan"), dtype=total)
    is_float = weights is not None and weights.dtype == torch.float32
    kernels.call(
        "segment_reduce", x.dtype, REDUCES.index(reduce), out, totals, x, x.stride(0), segments,
        weights, int(is_float), torch.empty(2 * num_segments, dtype=torch.int32), len(x),
        num_segments, x.shape[1],
    )  # fmt: skip
    return out, totals


def check(
    kernels: Kernels,
    x: Tensor,
    segments: Tensor,
    num_segments: int,
    reduce: str,
    weights: Tensor | None,
) -> None:
    out, totals = reduced(kernels, x, segments, num_segments, reduce, weights)
    wide = None if weights is None else weights.double()
    exact = reference(x.double(), segments, num_segments, reduce, wide)
    assert_close_to_reference("out", out, exact.to(x.dtype), exact, factor=3.0)
    if reduce == "mean":
        ones = torch.ones(len(x), dtype=torch.float64) if wide is None else wide
        want = torch.zeros(num_segments, dtype=torch.float64).index_add(0, segments, ones)
        torch.testing.assert_close(totals, want.to(totals.dtype))


def check_amax_backward(
    kernels: Kernels, x: Tensor, segments: Tensor, num_segments: int, grad: Tensor
) -> None:
    leaf = x.clone().requires_grad_()
    out = reference(leaf, segments, num_segments, "amax")
    (want,) = torch.autograd.grad(out, leaf, grad, materialize_grads=True, allow_unused=True)
    got = torch.full_like(x, float("nan"))
    kernels.call(
        "segment_reduce_amax_backward", x.dtype, grad, grad.stride(0), x, x.stride(0),
        out.detach(), segments, got, torch.empty(2 * num_segments, dtype=torch.int32), len(x),
        num_segments, x.shape[1],
    )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES_BY_ID[case], dtype)
    check(kernels, **inputs)
    if inputs["reduce"] == "amax":
        x, segments, num_segments = inputs["x"], inputs["segments"], inputs["num_segments"]
        grad = torch.randn(num_segments, x.shape[1], generator=torch.Generator().manual_seed(1))
        check_amax_backward(kernels, x, segments, num_segments, grad.to(dtype))


@pytest.mark.parametrize(
    ("reduce", "weighted"),
    [(r, w) for r in REDUCES for w in ("", "same", "float32") if not (r == "amax" and w)],
)
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_segment_reduce(
    kernels: Kernels, sizes: tuple[int, int, int], dtype: torch.dtype, reduce: str, weighted: str
) -> None:
    num_segments = sizes[1]
    x, segments, weight = make(sizes, dtype)
    weights = None if not weighted else weight.float() if weighted == "float32" else weight
    check(kernels, x, segments, num_segments, reduce, weights)


def test_not_a_number_is_the_largest(kernels: Kernels) -> None:
    x = torch.tensor([[1.0], [torch.nan], [2.0], [-3.0], [-2.0]])
    out, _ = reduced(kernels, x, torch.tensor([0, 0, 0, 1, 1]), 2, "amax")
    assert out[0].isnan()
    assert out[1] == -2


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_rows(kernels: Kernels, reduce: str, offset: int) -> None:
    x, segments, _ = make(SIZES["16-byte"], torch.bfloat16)
    strided = torch.zeros(len(x), 67, dtype=x.dtype)[:, offset : offset + 64].copy_(x)
    got, want = (reduced(kernels, t, segments, 25, reduce)[0] for t in (strided, x))
    assert torch.equal(got, want)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(("sizes", "dtype"), SHAPES)
def test_amax_backward(
    kernels: Kernels, sizes: tuple[int, int, int], dtype: torch.dtype, expanded: bool
) -> None:
    _, num_segments, width = sizes
    x, segments, _ = make(sizes, dtype, rounded=True)
    x.flatten()[::17] = float("nan")
    row = torch.randn(1 if expanded else num_segments, width).to(dtype)
    check_amax_backward(kernels, x, segments, num_segments, row.expand(num_segments, width))
