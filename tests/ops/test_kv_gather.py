from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import kv_append, kv_gather
from mor.ops.kv_gather import reference
from tests.support.operators import (
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNUSED = -123456  # block number where no row is


def make_table(
    seq_lens: list[int], block_size: int, generator: torch.Generator, shared: bool = False
) -> tuple[Tensor, int]:
    """Blocks out of order, each of one entry or (shared) of several; returns how many there are."""
    blocks = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(blocks) + 2
    table = torch.full((len(seq_lens), max([1, *blocks])), UNUSED, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=generator).int()
    if shared:
        order = order[torch.randint(0, (num_blocks + 1) // 2, (num_blocks,), generator=generator)]
    for b, dealt in enumerate(order[:-2].split(blocks)):
        table[b, : blocks[b]] = dealt
    return table, num_blocks


def make_inputs(
    seq_lens: list[int],
    block: tuple[int, int, int],
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """`block` is (block_size, Hkv, head_dim)."""
    generator = generator or torch.Generator().manual_seed(0)
    table, num_blocks = make_table(seq_lens, block[0], generator, shared)
    caches = (
        torch.randn(num_blocks, *block, generator=generator, dtype=torch.float64).to(device, dtype)
        for _ in "kv"
    )
    return {
        "k_cache": next(caches),
        "v_cache": next(caches),
        "block_table": table.to(device),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device=device),
        "num_rows": sum(seq_lens),
    }


def case(seq_lens: list[int], block: tuple[int, int, int], shared: bool = False) -> OpCase:
    name = "none" if not seq_lens else "-".join(map(str, seq_lens))
    return OpCase(
        id=f"{name}-block{block[0]}-{block[1]}x{block[2]}" + "-shared" * shared,
        op=kv_gather,
        reference=reference,
        raw=torch.ops.mor.kv_gather.default,
        make=lambda *args: make_inputs(seq_lens, block, shared, *args),
        exact=True,
    )


CASES = [
    case([], (4, 2, 8)),
    case([0, 0], (4, 2, 8)),
    case([3], (4, 0, 8)),
    case([3], (4, 2, 0)),
    case([1], (1, 1, 1)),
    case([5, 0, 33, 1, 7], (1, 2, 17)),
    case([5, 0, 33, 1, 16], (16, 3, 64)),
    case([5, 40, 33, 15], (5, 2, 9), shared=True),
    case([300, 7, 129], (16, 3, 64)),
]


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
