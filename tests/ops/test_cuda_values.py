"""What the CUDA operators make of values that the CPU refuses: nothing leaves its bounds.

To check them would be to wait for the device, so the contracts (csrc/ops) say what happens
instead. Runs on a GPU, and in tests/simt on the CUDA operators compiled for the CPU.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mor.ops import bipartite_match, group_rows, kv_append, kv_gather, route_threshold, route_topk
from mor.ops.kv_gather import reference as gathered
from mor.ops.route_topk import reference as best_rows
from tests.cases.kv_append import make_inputs as tokens
from tests.cases.kv_gather import make_inputs as entries
from tests.cases.route_topk import VALUES
from tests.support.operators import DTYPES, ON_SIMT

DEVICE = "cpu" if ON_SIMT else "cuda"
pytestmark = [
    pytest.mark.skipif(not ON_SIMT and not torch.cuda.is_available(), reason="no CUDA device"),
    *([] if ON_SIMT else [pytest.mark.cuda]),
]


@pytest.fixture(autouse=True)
def _new_tensors_on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def bounds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_keys_are_clamped() -> None:
    rows, offsets = group_rows(torch.tensor([5, -1, 1, 0]), 2)
    assert rows.tolist() == [1, 3, 0, 2]
    assert offsets.tolist() == [0, 2, 4]


def test_slots_past_the_cache_are_skipped() -> None:
    inputs = tokens((2, 4, 2, 8), 3, device=DEVICE, generator=torch.Generator("cpu"))
    inputs["slot_mapping"] = torch.tensor([8, 2, 2**60])
    want = inputs["k_cache"].clone()
    want.view(8, 2, 8)[2] = inputs["k"][1]
    kv_append(**inputs)
    assert torch.equal(inputs["k_cache"], want)


def test_lengths_and_sums_are_clamped() -> None:
    with torch.device("cpu"):
        inputs = entries([5, 8], (4, 1, 8), device=DEVICE)
    want = gathered(**inputs)
    inputs["seq_lens"] = bounds(5, 10**6)  # of two blocks, 8 rows
    k, _, cu_seqlens = kv_gather(**inputs | {"num_rows": 15})
    assert torch.equal(k[:13], want[0])
    assert (k[13:] == 0).all()
    assert cu_seqlens.tolist() == [0, 5, 13]
    k, _, cu_seqlens = kv_gather(**inputs | {"num_rows": 7})
    assert torch.equal(k, want[0][:7])
    assert cu_seqlens.tolist() == [0, 5, 7]


def test_similar_rows_of_bounds_that_make_no_sense_exist() -> None:
    wild = bounds(-3, 4, 90)
    _, index = bipartite_match(torch.randn(6, 4), torch.randn(5, 4), wild, wild, "dot")
    assert index.max() < 5


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_is_the_lowest_score(dtype: torch.dtype, by_score: bool) -> None:
    with torch.device("cpu"):
        scores = VALUES["special"](300, torch.Generator().manual_seed(0))
    scores[::7] = torch.nan
    scores, k, cu_seqlens = scores.to(DEVICE, dtype), torch.tensor([5, 140]), bounds(0, 9, 300)
    rows = route_topk(scores, k, cu_seqlens, by_score=by_score)
    assert torch.equal(rows, best_rows(scores, k, cu_seqlens, by_score=by_score))


def test_best_rows_stay_in_bounds() -> None:
    scores, cu_seqlens = torch.arange(12.0), bounds(0, 8, 12)
    rows = route_topk(scores, torch.tensor([100, -3]), cu_seqlens, num_rows=3)
    assert rows.tolist() == [0, 1, 2]
    k = torch.tensor([2, 1])
    rows = route_topk(scores, k, cu_seqlens, num_rows=6, by_score=True)
    assert rows.tolist() == [7, 6, 11, 0, 0, 0]
    rows = route_topk(scores, k, bounds(-5, 90, 3), num_rows=3)
    assert rows.tolist() == [10, 11, 0]


def chosen(scores: Tensor, threshold: float | Tensor, cu_seqlens: Tensor, **rule: int | str) -> str:
    return " ".join(str(t.tolist()) for t in route_threshold(scores, threshold, cu_seqlens, **rule))


def test_rows_that_do_not_fit_are_dropped() -> None:
    ones, cu_seqlens = torch.ones(12), bounds(0, 8, 12)
    assert chosen(ones, 0.5, cu_seqlens, max_rows=10) == f"{list(range(10))} [0, 8, 10]"
    assert chosen(ones, 0.5, cu_seqlens, max_rows=0) == "[] [0, 0, 0]"
    wild = bounds(-5, 90, 3)
    assert chosen(torch.arange(12.0), 9.5, wild, max_rows=3) == "[10, 11, -1] [0, 2, 2]"


def test_what_is_no_weight_counts_as_nothing() -> None:
    scores, all_five = torch.tensor([torch.nan, 1.0, -2.0, torch.nan, 3.0]), bounds(0, 5)
    assert chosen(scores, 0.5, all_five) == "[1, 4] [0, 2]"
    assert chosen(scores, 0.5, all_five, min_k=4) == "[0, 1, 2, 4] [0, 4]"
    assert chosen(scores, 0.5, all_five, kind="quantile") == "[1, 4] [0, 2]"
    assert chosen(scores, 1.0, all_five, kind="mass") == "[1, 4] [0, 2]"
    nothing = torch.tensor([-1.0, torch.nan])
    assert chosen(nothing, 1.0, bounds(0, 2), kind="mass") == "[] [0, 0]"
    infinite = torch.tensor([1.0, torch.inf, 2.0])  # ranks highest all the same
    assert chosen(infinite, 0.5, bounds(0, 3), kind="mass") == "[1, 2] [0, 2]"


@pytest.mark.parametrize("kind", ["quantile", "mass"])
def test_shares_out_of_range_are_clamped(kind: str) -> None:
    scores, cu_seqlens = torch.rand(20), bounds(0, 12, 20)
    wild, clamped = torch.tensor([-0.5, 1.5]), torch.tensor([0.0, 1.0])
    got, want = (chosen(scores, each, cu_seqlens, kind=kind) for each in (wild, clamped))
    assert got == want
