"""kv_gather: rows of entries of a paged cache, packed."""

import torch
from torch import Tensor

from mor.ops._checks import (
    check_kv_cache,
    check_operands,
    expect,
    refuse_gradients,
    refuse_non_tensors,
)

__all__ = ["kv_gather", "reference"]

_operator = torch.ops.mor.kv_gather.default


def kv_gather(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the cached rows of some entries, one entry after the other, in cache order.

    So `depth_attention` can read what `kv_append` wrote. An entry is one (sequence, recursion or
    layer) pair; entries may share blocks.

    Args:
        k_cache: [num_blocks, block_size, Hkv, head_dim] float32, bfloat16, float16 or float64; any
            strides with a contiguous head_dim.
        v_cache: as `k_cache`.
        block_table: [B, max_blocks] int32, the blocks of each entry in order; those past its length
            are not looked at.
        seq_lens: [B] int32, the rows of each entry.
        num_rows: sum of `seq_lens`, given so that the device is never waited for.

    Returns:
        k and v [num_rows, Hkv, head_dim], contiguous, and cu_seqlens [B + 1] int32: entry b has the
        rows `cu_seqlens[b] .. cu_seqlens[b + 1] - 1`.

    Raises:
        RuntimeError: wrong rank, size, dtype, device or strides; where a gradient would be needed:
            there is none. On the CPU also wrong lengths, sum or block numbers; on CUDA lengths are
            clamped, rows past num_rows left out, rows of no entry 0, wrong blocks undefined.

    Reference: MoR paper, section 2.2.2 (recursion-wise caching).

    Example:
        >>> cache = torch.arange(6.0).view(3, 2, 1, 1)  # three blocks of two rows
        >>> table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
        >>> k, v, cu = kv_gather(cache, cache, table, torch.tensor([3, 1], dtype=torch.int32), 4)
        >>> k.flatten(), cu
        (tensor([4., 5., 0., 2.]), tensor([0, 3, 4], dtype=torch.int32))
    """
    try:
        refuse_gradients("kv_gather", "torch.no_grad()", k_cache=k_cache, v_cache=v_cache)
        return _operator(k_cache, v_cache, block_table, seq_lens, num_rows)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            kv_gather, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens
        )
        raise


def reference(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    block_size = k_cache.shape[1]
    slots = [torch.zeros(0, dtype=torch.int64, device=k_cache.device)]
    for blocks, length in zip(block_table.long(), seq_lens.tolist(), strict=True):
        at = torch.arange(length, device=k_cache.device)
        slots.append(blocks[at // block_size] * block_size + at % block_size)
    rows = torch.cat(slots)
    ends = seq_lens.cumsum(0, dtype=torch.int32)
    return (
        k_cache.flatten(0, 1)[rows],
        v_cache.flatten(0, 1)[rows],
        torch.cat([ends.new_zeros(1), ends]),
    )


@torch.library.register_fake("mor::kv_gather")
def _(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    op = "kv_gather"
    check_operands(op, k_cache, v_cache, block_table, seq_lens)
    check_kv_cache(k_cache, v_cache, op)
    expect(op, num_rows >= 0, "num_rows in [0, 2^31)", num_rows)
    expect(op, num_rows < 2**31, "num_rows in [0, 2^31)", num_rows)
    rows = (num_rows, *k_cache.shape[2:])
    return (
        k_cache.new_empty(rows),
        v_cache.new_empty(rows),
        seq_lens.new_empty(block_table.shape[0] + 1),
    )
