import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_kv_append import CASES, make_inputs

from mor.ops.kv_append import reference

CASES_BY_ID = in_harness(CASES)


def run(kernels: Kernels, k_cache, v_cache, k, v, slot_mapping):
    size = k.element_size()
    sides = ((k_cache, k), (v_cache, v))
    strides = [s for c, rows in sides for s in (*c.stride()[:3], *rows.stride()[:2])]
    blocks, block_size, heads, head_dim = k_cache.shape
    kernels.call(
        "kv_append", k_cache, v_cache, k, v, slot_mapping, torch.tensor(strides) * size,
        len(slot_mapping), blocks * block_size, block_size, heads, head_dim * size,
    )  # fmt: skip


def check(kernels: Kernels, inputs) -> None:
    want = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    reference(*want, inputs["k"], inputs["v"], inputs["slot_mapping"])
    run(kernels, **inputs)
    assert torch.equal(inputs["k_cache"], want[0])
    assert torch.equal(inputs["v_cache"], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_kv_append(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, inputs_of(CASES_BY_ID[case], dtype))


def test_many_tokens_in_blocks_of_32(kernels: Kernels) -> None:
    check(kernels, make_inputs((20, 16, 1, 8), 1100, "repeated", torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_caches_and_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    inputs = make_inputs((6, 5, 3, 8), 11, "repeated", dtype)
    pool = torch.stack([inputs["k_cache"], inputs["v_cache"]], dim=1).transpose(2, 3).contiguous()
    inputs["k_cache"], inputs["v_cache"] = pool.transpose(2, 3).unbind(1)
    fused = torch.cat([inputs["k"], inputs["v"]], dim=1)
    inputs["k"], inputs["v"] = fused[:, :3], fused[:, 3:]
    check(kernels, inputs)


def test_slots_past_the_cache_are_skipped(kernels: Kernels) -> None:
    inputs = make_inputs((2, 4, 2, 8), 3)
    inputs["slot_mapping"] = torch.tensor([8, 2, 2**60])
    before = inputs["k_cache"].clone()
    before.view(8, 2, 8)[2] = inputs["k"][1]
    run(kernels, **inputs)
    assert torch.equal(inputs["k_cache"], before)


def test_neighbours_with_one_slot(kernels: Kernels) -> None:
    inputs = make_inputs((6, 5, 3, 8), 30)
    inputs["slot_mapping"] = torch.arange(30) // 2
    check(kernels, inputs)


@pytest.mark.parametrize("operand", ["k_cache", "v_cache", "k", "v"])
@pytest.mark.parametrize("width", [6, 9])
def test_an_operand_in_the_middle_of_other_memory(
    kernels: Kernels, operand: str, width: int
) -> None:
    """Its address or strides are odd: the sanitizer sees it if 4-byte chunks are taken for it."""
    inputs = make_inputs((6, 5, 3, 6), 11, "repeated", torch.bfloat16)
    t = inputs[operand]
    strides = [s // 6 * width for s in t.stride()[:-1]]
    memory = torch.zeros(t.numel() // 6 * width + 1, dtype=t.dtype)
    inputs[operand] = memory.as_strided(t.shape, (*strides, 1), int(width == 6)).copy_(t)
    check(kernels, inputs)
