import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_kv_gather import CASES, make_inputs

from mor.ops.kv_gather import reference

CASES_BY_ID = in_harness(CASES)


def run(kernels: Kernels, k_cache, v_cache, block_table, seq_lens, num_rows):
    size = k_cache.element_size()
    strides = [s for c in (k_cache, v_cache) for s in c.stride()[:3]]
    _, block_size, heads, head_dim = k_cache.shape
    k, v = (torch.empty(num_rows, heads, head_dim, dtype=k_cache.dtype) for _ in "kv")
    cu_seqlens = torch.empty(len(seq_lens) + 1, dtype=torch.int32)
    kernels.call(
        "kv_gather", k_cache, v_cache, k, v, block_table, seq_lens, cu_seqlens,
        torch.tensor(strides) * size, len(seq_lens), block_table.shape[1], block_size, num_rows,
        heads, head_dim * size,
    )  # fmt: skip
    return k, v, cu_seqlens


def check(kernels: Kernels, inputs) -> None:
    for got, want in zip(run(kernels, **inputs), reference(**inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_kv_gather(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, inputs_of(CASES_BY_ID[case], dtype))


def test_more_entries_than_a_scan_takes(kernels: Kernels) -> None:
    check(kernels, make_inputs([b % 3 for b in range(1500)], (4, 1, 8)))


def test_heads_first_cache(kernels: Kernels) -> None:
    inputs = make_inputs([5, 12, 0, 20], (5, 3, 8))
    inputs["k_cache"] = inputs["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    check(kernels, inputs)


def test_wrong_lengths_and_sums_stay_in_bounds(kernels: Kernels) -> None:
    inputs = make_inputs([5, 8], (4, 1, 8))
    want = reference(**inputs)
    inputs["seq_lens"] = torch.tensor([5, 10**6], dtype=torch.int32)  # two blocks: clamped to 8
    inputs["num_rows"] = 15
    k, _, cu_seqlens = run(kernels, **inputs)
    assert torch.equal(k[:13], want[0])
    assert (k[13:] == 0).all()
    assert cu_seqlens.tolist() == [0, 5, 13]
    inputs["num_rows"] = 7
    k, _, cu_seqlens = run(kernels, **inputs)
    assert torch.equal(k, want[0][:7])
    assert cu_seqlens.tolist() == [0, 5, 7]


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("width", [6, 9])
def test_a_cache_in_the_middle_of_other_memory(kernels: Kernels, cache: str, width: int) -> None:
    """Its address or strides are odd: the sanitizer sees it if 4-byte chunks are taken for it."""
    inputs = make_inputs([5, 12, 0, 20], (5, 3, 6), dtype=torch.bfloat16)
    t = inputs[cache]
    strides = [s // 6 * width for s in t.stride()[:-1]]
    memory = torch.zeros(t.numel() // 6 * width + 1, dtype=t.dtype)
    inputs[cache] = memory.as_strided(t.shape, (*strides, 1), int(width == 6)).copy_(t)
    check(kernels, inputs)
