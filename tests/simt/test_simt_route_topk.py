from typing import Any

import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_route_topk import CASES, packed
from torch import Tensor

from mor.ops.route_topk import reference

CASES_BY_ID = in_harness(CASES)
LENGTHS = {
    "one": [1],
    "ragged": [5, 0, 300, 1, 0],
    "two tiles": [1500, 33],
    "empty first": [0, 0, 7],
    "no sequence": [],
}


def select(
    kernels: Kernels,
    scores: Tensor,
    k: int | Tensor,
    cu_seqlens: Tensor,
    num_selected: int,
    candidates: Tensor | None = None,
    protected_rows: Tensor | None = None,
    by_score: bool = False,
) -> Tensor:
    num_sequences = cu_seqlens.numel() - 1
    masked = candidates is not None or protected_rows is not None
    rows = torch.full((num_selected,), -7)
    kernels.call(
        "route_topk",
        scores,
        scores.dtype,
        0 if isinstance(k, Tensor) else k,
        k if isinstance(k, Tensor) else None,
        cu_seqlens,
        candidates,
        protected_rows,
        torch.empty(num_sequences, dtype=torch.int64) if masked else None,
        torch.empty(num_sequences, dtype=torch.int64) if masked else None,
        torch.empty(num_sequences + 1, dtype=torch.int64) if by_score else None,
        torch.empty(num_selected, dtype=torch.int64) if by_score else None,
        rows,
        scores.numel(),
        num_sequences,
        num_selected,
    )
    return rows


def check(
    kernels: Kernels, scores: Tensor, k: int | Tensor, cu_seqlens: Tensor, **options: Any
) -> None:
    expected = reference(scores, k, cu_seqlens, **options)
    rows = select(kernels, scores, k, cu_seqlens, expected.numel(), **options)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, **inputs_of(CASES_BY_ID[case], dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("values", ["random", "ties", "equal", "special"])
def test_route_topk(kernels: Kernels, lengths: list[int], dtype: torch.dtype, values: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    scores = torch.randn(n, generator=generator)
    if values == "ties":
        scores = scores.round()
    elif values == "equal":
        scores = torch.full((n,), -0.25)
    elif values == "special":
        specials = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40])
        scores = specials[torch.randint(0, 7, (n,), generator=generator)]
    scores = scores.to(dtype)
    k = torch.tensor([length - length // 2 for length in lengths], dtype=torch.int64)
    cu_seqlens = packed(lengths)
    for by_score in (False, True):
        check(kernels, scores, k, cu_seqlens, by_score=by_score)


@pytest.mark.parametrize("by_score", [False, True])
def test_route_topk_masks(kernels: Kernels, by_score: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = packed([40, 0, 300, 7])
    scores = torch.randn(347, generator=generator).round()
    candidates = torch.rand(347, generator=generator) < 0.6
    protected_rows = torch.rand(347, generator=generator) < 0.1
    k = torch.tensor([9, 0, 100, 0])
    for given in ((candidates, None), (None, protected_rows), (candidates, protected_rows)):
        masks = dict(zip(("candidates", "protected_rows"), given, strict=True))
        check(kernels, scores, k, cu_seqlens, by_score=by_score, **masks)


def test_route_topk_one_k_for_all(kernels: Kernels) -> None:
    scores = torch.randn(90, generator=torch.Generator().manual_seed(2))
    check(kernels, scores, 7, packed([40, 20, 30]))


def test_route_topk_never_writes_outside(kernels: Kernels) -> None:
    scores = torch.arange(12.0)
    too_many = torch.tensor([100, -3])
    rows = select(kernels, scores, too_many, packed([8, 4]), 3)
    assert torch.equal(rows, torch.tensor([0, 1, 2]))
    rows = select(kernels, scores, torch.tensor([2, 1]), packed([8, 4]), 6, by_score=True)
    assert torch.equal(rows, torch.tensor([7, 6, 11, 0, 0, 0]))
    wild = torch.tensor([-5, 90, 3], dtype=torch.int32)
    rows = select(kernels, scores, torch.tensor([2, 1]), wild, 3)
    assert torch.equal(rows, torch.tensor([10, 11, 0]))
