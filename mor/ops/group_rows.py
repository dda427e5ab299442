"""group_rows: stable counting sort of rows by key."""

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect, refuse_non_tensors

__all__ = ["group_rows", "reference"]

_operator = torch.ops.mor.group_rows.default


def group_rows(
    keys: Tensor, num_keys: int, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Groups the rows 0 .. N - 1 by key, in ascending order inside each key.

    Args:
        keys: [N] int64, int32 or bool, each in [0, num_keys).
        num_keys: number of keys.
        cu_seqlens: [B + 1] int32; sequence b owns rows `cu_seqlens[b]` to `cu_seqlens[b + 1] - 1`.

    Returns:
        `rows` [N] and `offsets`, int64. Without `cu_seqlens` there are num_keys + 1 offsets and
        `rows[offsets[key] : offsets[key + 1]]` have that key; with it num_keys * B + 1, and
        `rows[offsets[key * B + b] : offsets[key * B + b + 1]]` are those of sequence b. The device
        is never waited for.

    Raises:
        RuntimeError: wrong rank, dtype or device. On the CPU also a key out of range and cu_seqlens
            that do not rise from 0 to N; on CUDA both are clamped.

    Reference: MoR paper, section 2.2.1 (token-choice routing: key 1 where a token continues).

    Example:
        >>> group_rows(torch.tensor([1, 0, 1, 1]), 2)
        (tensor([1, 0, 2, 3]), tensor([0, 1, 4]))
    """
    try:
        return _operator(keys, num_keys, cu_seqlens)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(group_rows, keys=keys, cu_seqlens=cu_seqlens)
        raise


def reference(
    keys: Tensor, num_keys: int, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: a stable sort, and a count of (key, sequence) pairs."""
    keys = keys.long()
    rows = torch.argsort(keys, stable=True)
    if cu_seqlens is None:
        runs, num_runs = keys, num_keys
    else:
        num_sequences = cu_seqlens.numel() - 1
        lengths = cu_seqlens.long().diff()
        sequences = torch.arange(num_sequences, device=keys.device).repeat_interleave(lengths)
        runs, num_runs = keys * num_sequences + sequences, num_keys * num_sequences
    counts = torch.bincount(runs, minlength=num_runs)
    return rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@torch.library.register_fake("mor::group_rows")
def _(keys: Tensor, num_keys: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    op = "group_rows"
    check_operands(op, keys, cu_seqlens)
    expect(op, num_keys >= 1, "num_keys >= 1", num_keys)
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        keys.new_empty(keys.shape[0], dtype=torch.int64),
        keys.new_empty(num_keys * num_sequences + 1, dtype=torch.int64),
    )
