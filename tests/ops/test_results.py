"""Memory of large results: reused once they died, never before, and not kept without bound."""

import multiprocessing
import sys

import psutil
import pytest
import torch
from torch import Tensor

from mor.ops import gather_tokens

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory"),
]
MIB = 2**20


def large(value: float, mib: float = 8) -> Tensor:
    """A result of so many MiB, every element `value`."""
    rows = torch.zeros(int(mib * MIB) // 4 // 1024, dtype=torch.int64)
    return gather_tokens(torch.full((1, 1024), value), rows)


@pytest.mark.parametrize("mib", [4.25, 4.5, 7, 8])  # memory comes in units of 2 MiB
def test_memory_of_a_dead_result_serves_the_next(mib: float) -> None:
    first = large(1.0, mib)
    address = first.data_ptr()
    del first
    assert large(2.0, mib).data_ptr() == address


def test_memory_is_not_reused_while_a_view_lives() -> None:
    view = large(1.0)[3:5]
    others = [large(2.0) for _ in range(4)]
    assert view.eq(1).all()
    assert all(other.eq(2).all() for other in others)


def test_results_of_other_dtypes_share_the_memory() -> None:
    first = large(1.0)
    address = first.data_ptr()
    del first
    rows = torch.zeros(8 * MIB // 2 // 1024, dtype=torch.int64)
    second = gather_tokens(torch.ones(1, 1024, dtype=torch.bfloat16), rows)
    assert (second.data_ptr(), second.dtype) == (address, torch.bfloat16)
    assert second.eq(1).all()


def test_a_small_result_can_be_resized_and_a_large_one_says_why_not() -> None:
    assert large(1.0, mib=1).resize_(3).shape == (3,)
    with pytest.raises(RuntimeError, match="resize"):
        large(1.0).resize_(64 * MIB)


def _growth_after_many_results() -> int:
    before = psutil.Process().memory_info().rss
    results = [large(1.0, mib=32) for _ in range(20)]
    assert psutil.Process().memory_info().rss - before > 600 * MIB
    del results
    return psutil.Process().memory_info().rss - before


@pytest.mark.unsanitized
def test_kept_memory_is_bounded() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_growth_after_many_results) <= 300 * MIB
