import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_bipartite_match import CASES
from test_route_topk import packed
from torch import Tensor

from mor.ops.bipartite_match import reference
from tests.support.operators import assert_close_to_reference

CASES_BY_ID = in_harness(CASES)
LENGTHS = {
    "one": ([1], [1]),
    "ragged": ([5, 0, 33, 17, 1], [7, 4, 0, 65, 1]),
    "tiles": ([70, 61], [64, 130]),
    "no-b": ([3], [0]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def match(
    kernels: Kernels, a: Tensor, b: Tensor, cu_a: Tensor, cu_b: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    total = torch.float64 if a.dtype == torch.float64 else torch.float32
    cosine = metric == "cosine"
    scores, index = torch.full((a.shape[0],), torch.nan, dtype=total), torch.full(a.shape[:1], -7)
    norms = [torch.empty(t.shape[0], dtype=total) if cosine else None for t in (a, b)]
    kernels.call(
        "bipartite_match", a.dtype, a, a.stride(0), b, b.stride(0), cu_a, cu_b, *norms, scores,
        index, a.shape[0], b.shape[0], a.shape[1], cu_a.numel() - 1,
    )  # fmt: skip
    return scores, index


def check(
    kernels: Kernels, a: Tensor, b: Tensor, cu_seqlens_a: Tensor, cu_seqlens_b: Tensor, metric: str
) -> None:
    bounds = cu_seqlens_a, cu_seqlens_b
    scores, index = match(kernels, a, b, *bounds, metric)
    low, _ = reference(a, b, *bounds, metric)
    want, where = reference(a.double(), b.double(), *bounds, metric)
    assert_close_to_reference("scores", scores, low, want, factor=3.0)
    assert torch.equal(index >= 0, where >= 0)
    found = index >= 0
    each = torch.arange(int(found.sum()) + 1, dtype=torch.int32)
    mine, _ = reference(a[found].double(), b[index[found]].double(), each, each, metric)
    torch.testing.assert_close(mine, want[found], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, **inputs_of(CASES_BY_ID[case], dtype))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("width", [0, 1, 33, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bipartite_match(
    kernels: Kernels,
    dtype: torch.dtype,
    lengths: tuple[list[int], list[int]],
    width: int,
    metric: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(sum(n), width, generator=generator).to(dtype) for n in lengths)
    check(kernels, a, b, packed(lengths[0]), packed(lengths[1]), metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smaller_of_equals_wins(kernels: Kernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = [70, 5], [150, 9]
    bounds = packed(counts[0]), packed(counts[1])
    for width in (1, 8):
        a, b = (torch.randn(sum(n), width, generator=generator).round().to(dtype) for n in counts)
        got = match(kernels, a, b, *bounds, "dot")
        for mine, want in zip(got, reference(a, b, *bounds, "dot"), strict=True):
            assert torch.equal(mine, want)


def test_not_a_number_and_zeros(kernels: Kernels) -> None:
    zero, one, nan = torch.zeros(3), torch.tensor([1.0, 2.0, 2.0]), torch.full((3,), torch.nan)
    a, b = torch.stack([zero, one, nan, -one]), torch.stack([nan, zero, one])
    scores, index = match(kernels, a, b, packed([4]), packed([3]), "cosine")
    assert index.tolist() == [1, 2, -1, 1]
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, -torch.inf, 0.0]))


@pytest.mark.parametrize("operand", ["a", "b"])
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_rows(kernels: Kernels, operand: str, offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {n: torch.randn(70, 64, generator=generator).bfloat16() for n in ("a", "b")}
    bounds = packed([70]), packed([70])
    want = match(kernels, *rows.values(), *bounds, "cosine")
    memory = torch.zeros(70, 67, dtype=torch.bfloat16)[:, offset : offset + 64]
    rows[operand] = memory.copy_(rows[operand])
    got = match(kernels, *rows.values(), *bounds, "cosine")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


def test_bounds_that_make_no_sense_read_nothing_outside(kernels: Kernels) -> None:
    a, b = torch.randn(6, 4), torch.randn(5, 4)
    wild = torch.tensor([-3, 4, 90], dtype=torch.int32)
    _, index = match(kernels, a, b, wild, wild, "dot")
    assert index.max() < 5
