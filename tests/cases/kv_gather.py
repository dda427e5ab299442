"""Entries to read from a paged cache: blocks out of order, some shared."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import kv_gather
from mor.ops.kv_gather import reference
from tests.support.operators import OpCase

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
        opcheck=not seq_lens or shared,
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
