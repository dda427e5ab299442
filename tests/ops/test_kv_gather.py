from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import kv_append, kv_gather
from mor.ops.kv_gather import reference
from tests.cases.kv_gather import CASES, make_inputs
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_kv_gather(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    with instruction_set(isa):
        for op_case in CASES[-3:]:
            check_op(op_case, torch.bfloat16)


# (block_size, Hkv, head_dim), entries; the last result is written around the cache.
POOLS = [((5, 3, 8), [5, 12, 0, 20]), ((5, 1, 8), [5, 12, 0, 20]), ((16, 4, 128), [4001, 3000])]


@pytest.mark.parametrize("layout", ["layers", "fused", "rows", "heads_first"])
@pytest.mark.parametrize(("shape", "lengths"), POOLS, ids=str)
def test_slices_of_a_pool(layout: str, shape: tuple[int, int, int], lengths: list[int]) -> None:
    inputs = make_inputs(lengths, shape)
    blocks, (block_size, heads, head_dim) = inputs["k_cache"].shape[0], shape
    pool = {
        "layers": torch.zeros(2, blocks, 4, *shape)[:, :, 1],
        "fused": torch.zeros(blocks, 2, *shape).transpose(0, 1),
        "rows": torch.zeros(blocks, block_size, 2, heads, head_dim).permute(2, 0, 1, 3, 4),
        "heads_first": torch.zeros(2, blocks, heads, block_size, head_dim).transpose(2, 3),
    }[layout]
    pool.copy_(torch.stack([inputs["k_cache"], inputs["v_cache"]]))
    got = kv_gather(**{**inputs, "k_cache": pool[0], "v_cache": pool[1]})
    assert all(torch.equal(a, b) for a, b in zip(got, reference(**inputs), strict=True))


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("width", [6, 9])
def test_a_cache_in_the_middle_of_other_memory(cache: str, width: int) -> None:
    """Its address (width 6) or its strides (9) allow no access of more than one element."""
    inputs = make_inputs([5, 12, 0, 20], (5, 3, 6), dtype=torch.bfloat16)
    t = inputs[cache]
    strides = [s // 6 * width for s in t.stride()[:-1]]
    memory = torch.zeros(t.numel() // 6 * width + 1, dtype=t.dtype)
    inputs[cache] = memory.as_strided(t.shape, (*strides, 1), int(width == 6)).copy_(t)
    want = reference(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(kv_gather(**inputs), want, strict=True))


def test_more_entries_than_threads_of_a_block() -> None:
    inputs = make_inputs([b % 3 for b in range(1500)], (4, 1, 8))
    want = reference(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(kv_gather(**inputs), want, strict=True))


@pytest.mark.cpu_kernels
def test_result_past_the_cache_is_streamed_right() -> None:
    inputs = make_inputs([9000, 8003], (16, 4, 128))
    got = kv_gather(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, reference(**inputs), strict=True))


def test_gives_back_what_was_appended() -> None:
    inputs = make_inputs([5, 12, 0, 20], (5, 3, 8))
    k, v = torch.randn(37, 3, 8), torch.randn(37, 3, 8)
    slots = [
        int(inputs["block_table"][b, i // 5]) * 5 + i % 5
        for b, length in enumerate([5, 12, 0, 20])
        for i in range(length)
    ]
    kv_append(inputs["k_cache"], inputs["v_cache"], k, v, torch.tensor(slots))
    got_k, got_v, cu_seqlens = kv_gather(**inputs)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    assert cu_seqlens.tolist() == [0, 5, 17, 17, 37]


def test_a_gradient_is_refused() -> None:
    inputs = make_inputs([3], (2, 1, 4))
    inputs["v_cache"].requires_grad_()
    check_bad_input("kv_gather: expected operands that need no gradient", kv_gather, **inputs)


@pytest.mark.unsanitized
def test_compiles() -> None:
    inputs = make_inputs([5, 12, 0, 20], (5, 3, 8))

    def total(**kwargs: Any) -> Tensor:
        k, v, _ = kv_gather(**kwargs)
        return (k * 2 + v).sum()

    torch.testing.assert_close(torch.compile(total, fullgraph=True)(**inputs), total(**inputs))


INT = torch.int32
BAD: dict[str, dict[str, Any]] = {
    "k_cache of shape": {"k_cache": torch.zeros(3, 4, 2)},
    "k_cache with a contiguous head_dim": {"k_cache": torch.zeros(9, 4, 8, 2).mT},
    r"block_table of shape \[B, max_blocks\]": {"block_table": torch.zeros(2, dtype=INT)},
    "block_table of dtype int32, got int64": {"block_table": torch.zeros(2, 3).long()},
    r"seq_lens of shape \[B\]": {"seq_lens": torch.zeros(2, 1, dtype=INT)},
    "seq_lens of dtype int32, got int64": {"seq_lens": torch.zeros(2).long()},
    "seq_lens of 2 elements": {"seq_lens": torch.zeros(3, dtype=INT)},
    r"num_rows in \[0, 2\^31\), got -1": {"num_rows": -1},
    r"num_rows in \[0, 2\^31\), got 2147483648": {"num_rows": 2**31},
}
BAD_VALUES: dict[str, dict[str, Any]] = {
    r"seq_lens in \[0, 12\] .* got seq_lens\[1\] = 13": {"seq_lens": [5, 13]},
    r"seq_lens in \[0, 12\] .* got seq_lens\[0\] = -1": {"seq_lens": [-1, 3]},
    r"num_rows of 10 .* got 11": {"num_rows": 11},
    r"block_table in \[0, 9\), got block_table\[0, 1\] = 9": {
        "block_table": [[1, 9, 0], [0, 1, 2]],
    },
    r"block_table in \[0, 9\), got block_table\[1, 0\] = -1": {
        "block_table": [[1, 2, 0], [-1, 1, 2]],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", [*BAD, *BAD_VALUES])
def test_bad_input(message: str) -> None:
    good: dict[str, Any] = {
        "k_cache": torch.zeros(9, 4, 2, 8),
        "v_cache": torch.zeros(9, 4, 2, 8),
        "block_table": torch.tensor([[1, 2, 9], [8, 0, 3]], dtype=INT),
        "seq_lens": torch.tensor([5, 5], dtype=INT),
        "num_rows": 10,
    }
    kv_gather(**good)
    changed = BAD.get(message) or {
        name: torch.tensor(value, dtype=INT) if isinstance(value, list) else value
        for name, value in BAD_VALUES[message].items()
    }
    check_bad_input(
        f"kv_gather: expected {message}", kv_gather, fake=message in BAD, **{**good, **changed}
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_kv_gather_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
