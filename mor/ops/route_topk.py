"""route_topk: the k best rows of every packed sequence."""

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect, refuse_non_tensors

__all__ = ["reference", "route_topk"]

_operator = torch.ops.mor.route_topk.default


def route_topk(
    scores: Tensor,
    k: int | Tensor,
    cu_seqlens: Tensor,
    *,
    num_rows: int | None = None,
    candidates: Tensor | None = None,
    protected_rows: Tensor | None = None,
    by_score: bool = False,
) -> Tensor:
    """Chooses the k best rows of every packed sequence; of equal scores the smaller row wins.

    Args:
        scores: [N] float32, bfloat16, float16 (ranked on float32) or float64. Not differentiable:
            a gate reaches its router by gathering its scores at the rows.
        k: rows to choose in each sequence, an int or [B] int64 on the device of `scores`.
        cu_seqlens: [B + 1] int32; sequence b owns rows `cu_seqlens[b]` to `cu_seqlens[b + 1] - 1`.
        num_rows: number of rows returned, `sum(k)` plus the protected ones. Give it where k is a
            tensor or rows are protected: left out it is computed, which waits for the device and
            does not compile.
        candidates: [N] bool; only these rows may win.
        protected_rows: [N] bool; always returned, in addition to the k best of the others.
        by_score: best first inside each sequence instead of ascending.

    Returns:
        [num_rows] int64 rows, sequence after sequence, ascending; always the same ones.

    Raises:
        RuntimeError: wrong rank, dtype, device or size. On the CPU also a NaN that competes, k
            negative or above the rows that compete, a num_rows that is not the sum, and
            cu_seqlens that do not rise from 0 to N; on CUDA NaN ranks lowest and the rest is
            undefined, but writes nothing out of bounds.

    Reference: MoR paper, section 2.2.1 (expert-choice routing).

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2])
        >>> route_topk(scores, 2, torch.tensor([0, 3, 5], dtype=torch.int32))
        tensor([1, 2, 3, 4])
    """
    try:
        k_all, k_each = (0, k) if isinstance(k, Tensor) else (k, None)
        if num_rows is None:
            num_rows = k_all * (cu_seqlens.numel() - 1) if k_each is None else int(k_each.sum())
            if protected_rows is not None:
                num_rows += int(protected_rows.sum())
        return _operator(
            scores, k_all, k_each, cu_seqlens, num_rows, candidates, protected_rows, by_score
        )
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            route_topk,
            scores=scores,
            cu_seqlens=cu_seqlens,
            candidates=candidates,
            protected_rows=protected_rows,
        )
        raise


def reference(
    scores: Tensor,
    k: int | Tensor,
    cu_seqlens: Tensor,
    *,
    num_rows: int | None = None,
    candidates: Tensor | None = None,
    protected_rows: Tensor | None = None,
    by_score: bool = False,
) -> Tensor:
    """The same in plain PyTorch, sequence by sequence with a stable sort; NaN ranks lowest."""
    bounds = cu_seqlens.tolist()
    k_each = k.tolist() if isinstance(k, Tensor) else [k] * (len(bounds) - 1)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # A rank instead of the score: it orders NaN below -inf.
    lowest = torch.arange(0, dtype=torch.int64, device=scores.device)
    chosen = [lowest]
    for begin, end, count in zip(bounds, bounds[1:], k_each, strict=False):
        order = torch.arange(begin, end, device=scores.device)
        for key in (scores[begin:end], ~scores[begin:end].isnan()):
            position = torch.sort(key[order - begin], stable=True, descending=True).indices
            order = order[position]
        competes = torch.ones_like(order, dtype=torch.bool)
        if candidates is not None:
            competes &= candidates[order]
        taken = torch.zeros_like(competes)
        if protected_rows is not None:
            taken |= protected_rows[order]
            competes &= ~taken
        taken |= competes & (competes.cumsum(0) <= count)
        rows = order[taken]
        chosen.append(rows if by_score else rows.sort().values)
    return torch.cat(chosen)


@torch.library.register_fake("mor::route_topk")
def _(
    scores: Tensor,
    k: int,
    k_each: Tensor | None,
    cu_seqlens: Tensor,
    num_rows: int,
    candidates: Tensor | None,
    protected_rows: Tensor | None,
    by_score: bool,
) -> Tensor:
    op = "route_topk"
    check_operands(op, scores, cu_seqlens, k_each, candidates, protected_rows)
    expect(op, k >= 0, "k >= 0", k)
    expect(op, num_rows >= 0, "num_rows >= 0", num_rows)
    return scores.new_empty(num_rows, dtype=torch.int64)
