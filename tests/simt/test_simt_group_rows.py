import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_group_rows import CASES
from torch import Tensor

from mor.ops.group_rows import reference

CASES_BY_ID = in_harness(CASES)
LENGTHS = {
    "one": [1],
    "ragged": [5, 0, 300, 1, 0, 290],
    "whole chunks": [256, 256],
    "none": [],
    "empty": [0, 0],
}


def group(
    kernels: Kernels, keys: Tensor, num_keys: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    num_chunks = (keys.numel() + 255) // 256
    rows = torch.full((keys.numel(),), -7)
    offsets = torch.full((num_keys * num_sequences + 1,), -7)
    counts = torch.zeros(num_keys * num_chunks + 1, dtype=torch.int64)
    kernels.call(
        "group_rows",
        keys,
        keys.element_size(),
        cu_seqlens,
        counts,
        rows,
        offsets,
        keys.numel(),
        num_keys,
        num_sequences,
        num_chunks,
    )
    return rows, offsets


def check(kernels: Kernels, keys: Tensor, num_keys: int, cu_seqlens: Tensor | None) -> None:
    expected = reference(keys, num_keys, cu_seqlens)
    for got, want in zip(group(kernels, keys, num_keys, cu_seqlens), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str) -> None:
    check(kernels, **inputs_of(CASES_BY_ID[case], torch.float32))  # keys have their own dtype


@pytest.mark.parametrize(
    ("dtype", "num_keys"),
    [(torch.int64, n) for n in (1, 2, 9, 1500)] + [(torch.int32, 9), (torch.bool, 2)],
    ids=str,
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_group_rows(
    kernels: Kernels, lengths: list[int], dtype: torch.dtype, num_keys: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, num_keys, (sum(lengths),), generator=generator).to(dtype)
    for cu_seqlens in (None, torch.tensor([0, *lengths]).cumsum(0).int()):
        check(kernels, keys, num_keys, cu_seqlens)


def test_group_rows_clamps_keys(kernels: Kernels) -> None:
    rows, offsets = group(kernels, torch.tensor([5, -1, 1, 0]), 2, None)
    assert torch.equal(rows, torch.tensor([1, 3, 0, 2]))
    assert torch.equal(offsets, torch.tensor([0, 2, 4]))
