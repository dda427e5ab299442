from typing import Any

import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_route_threshold import CASES
from test_route_topk import packed
from torch import Tensor

from mor.ops.route_threshold import reference

CASES_BY_ID = in_harness(CASES)
KINDS = ("absolute", "quantile", "mass")
LENGTHS = {
    "one": [1],
    "ragged": [5, 0, 300, 1, 0],
    "two tiles": [1500, 33],
    "empty first": [0, 0, 7],
    "no rows": [0, 0],
}
VALUES = {
    "random": torch.rand,
    "ties": lambda n, generator: torch.randint(0, 5, (n,), generator=generator).float(),
    "equal": lambda n, generator: torch.full((n,), 0.1),
    "tiny": lambda n, generator: torch.rand(n, generator=generator) * 1e-39,
}


def select(
    kernels: Kernels,
    scores: Tensor,
    threshold: float | Tensor,
    cu_seqlens: Tensor,
    max_rows: int,
    kind: str = "absolute",
    inclusive: bool = False,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    num_sequences = cu_seqlens.numel() - 1
    each = threshold if isinstance(threshold, Tensor) else None
    # Of no sequences, route_threshold.cu fills the rows.
    rows = torch.full((max_rows,), -7 if num_sequences else -1)
    chosen = torch.full((num_sequences + 1,), -7, dtype=torch.int32)

    def scratch() -> Tensor:
        return torch.empty(num_sequences, dtype=torch.int64)

    kernels.call(
        "route_threshold",
        scores,
        scores.dtype,
        KINDS.index(kind),
        int(inclusive),
        0.0 if each is not None else threshold,
        each,
        int(each is not None and each.dtype == torch.float64),
        min_k,
        -1 if max_k is None else max_k,
        max_rows,
        cu_seqlens,
        candidates,
        None if candidates is None else scratch(),
        None if candidates is None else scratch(),
        scratch(),
        chosen,
        rows,
        scores.numel(),
        num_sequences,
    )
    return rows, chosen


def check(
    kernels: Kernels, scores: Tensor, threshold: Any, cu_seqlens: Tensor, **rule: Any
) -> None:
    wanted = reference(scores, threshold, cu_seqlens, **rule)
    got = select(kernels, scores, threshold, cu_seqlens, wanted[0].numel() + 2, **rule)
    assert torch.equal(got[0][:-2], wanted[0])
    assert got[0][-2:].tolist() == [-1, -1]
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES_BY_ID[case], dtype)
    if inputs["max_rows"] is None:
        del inputs["max_rows"]
        check(kernels, **inputs)
    else:
        for got, want in zip(select(kernels, **inputs), reference(**inputs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("values", VALUES)
def test_route_threshold(
    kernels: Kernels, lengths: list[int], dtype: torch.dtype, values: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = VALUES[values](sum(lengths), generator=generator).to(dtype)
    for kind in KINDS:
        for inclusive in (False, True) if kind != "mass" else (False,):
            check(kernels, scores, 0.6, packed(lengths), kind=kind, inclusive=inclusive)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_masks_and_a_threshold_each(kernels: Kernels, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = packed([40, 0, 300, 7])
    scores = torch.rand(347, generator=generator).mul(8).round()
    candidates = torch.rand(347, generator=generator) < 0.6
    each = torch.tensor([0.1, 0.5, 0.9, 1.0])
    for bounds in ({}, {"min_k": 30}, {"max_k": 5}, {"min_k": 4, "max_k": 4}, {"max_k": 0}):
        for mask in (None, candidates):
            rule = {"kind": kind, "candidates": mask, **bounds}
            check(kernels, scores, each, cu_seqlens, **rule)
            check(kernels, scores, each.double(), cu_seqlens, **rule)


def test_rows_that_do_not_fit_are_dropped(kernels: Kernels) -> None:
    rows, chosen = select(kernels, torch.ones(12), 0.5, packed([8, 4]), 10)
    assert rows.tolist() == list(range(10))
    assert chosen.tolist() == [0, 8, 10]
    rows, chosen = select(kernels, torch.ones(12), 0.5, packed([8, 4]), 0)
    assert chosen.tolist() == [0, 0, 0]
    wild = torch.tensor([-5, 90, 3], dtype=torch.int32)
    rows, chosen = select(kernels, torch.arange(12.0), 9.5, wild, 3)
    assert rows.tolist() == [10, 11, -1]
    assert chosen.tolist() == [0, 2, 2]


def test_what_is_no_number_ranks_lowest_and_weighs_nothing(kernels: Kernels) -> None:
    scores = torch.tensor([torch.nan, 1.0, -2.0, torch.nan, 3.0])
    bounds = packed([5])
    assert select(kernels, scores, 0.5, bounds, 3)[0].tolist() == [1, 4, -1]
    assert select(kernels, scores, 0.5, bounds, 5, min_k=4)[0].tolist() == [0, 1, 2, 4, -1]
    assert select(kernels, scores, 0.5, bounds, 3, "quantile")[0].tolist() == [1, 4, -1]
    assert select(kernels, scores, 1.0, bounds, 3, "mass")[0].tolist() == [1, 4, -1]
    nothing = torch.tensor([-1.0, torch.nan])
    assert select(kernels, nothing, 1.0, packed([2]), 1, "mass")[0].tolist() == [-1]
    infinite = torch.tensor([1.0, torch.inf, 2.0])  # ranks highest all the same
    assert select(kernels, infinite, 0.5, packed([3]), 3, "mass")[0].tolist() == [1, 2, -1]


@pytest.mark.parametrize("kind", ["quantile", "mass"])
def test_shares_out_of_range_are_clamped(kernels: Kernels, kind: str) -> None:
    scores, cu_seqlens = torch.rand(20), packed([12, 8])
    wild, clamped = torch.tensor([-0.5, 1.5]), torch.tensor([0.0, 1.0])
    got, want = (select(kernels, scores, each, cu_seqlens, 20, kind) for each in (wild, clamped))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_more_sequences_than_a_scan_takes(kernels: Kernels) -> None:
    lengths = [b % 4 for b in range(1100)]
    check(kernels, torch.rand(sum(lengths)), 0.4, packed(lengths))
