"""segment_reduce: rows that share a destination become one."""

from typing import Any

import torch
from torch import Tensor

from mor.ops.segment_reduce_check import check, check_amax_backward

__all__ = ["reference", "segment_reduce"]

_operator = torch.ops.mor.segment_reduce.default


def segment_reduce(
    x: Tensor,
    segments: Tensor,
    num_segments: int,
    reduce: str = "sum",
    weights: Tensor | None = None,
) -> Tensor:
    """Merges rows by destination; `gather_tokens(merged, segments)` takes the merge back.

    Sums run in float32 (float64 for float64) in ascending order of rows and are rounded once, so
    the result is always the same.

    Args:
        x: [N, D] float32, bfloat16, float16 or float64, or [N] or [N, ...]; differentiable.
        segments: [N] int64, the destination of each row, in [0, num_segments), any order; segments
            that never fall are the fast path.
        num_segments: rows of the result; S.
        reduce: "sum", "mean" or "amax". With `weights`, the sum or mean of weighted rows. The
            gradient of amax goes, in each column, to the first row of the maximum.
        weights: [N] float32 or the dtype of `x`; differentiable; not with amax.

    Returns:
        [S, D] (or [S], or [S, ...]), contiguous. 0 for a segment without rows, amax too, and for
        the mean of one whose weights add up to 0.

    Raises:
        RuntimeError: wrong rank, size, dtype, device or `reduce`; on the CPU also a segment out of
            range (undefined on CUDA).

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [6.0]])
        >>> segment_reduce(x, torch.tensor([1, 0, 1]), 3, "mean")
        tensor([[2.0000],
                [3.5000],
                [0.0000]])
    """
    rows = x.unsqueeze(1) if x.dim() == 1 else x.flatten(1) if x.dim() > 2 else x
    out, _ = _operator(rows, segments, num_segments, reduce, weights)
    return out if x.dim() == 2 else out.view(num_segments, *x.shape[1:])


def reference(
    x: Tensor,
    segments: Tensor,
    num_segments: int,
    reduce: str = "sum",
    weights: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in the dtype of x."""
    if reduce == "amax":
        rows = torch.full((num_segments, *x.shape[1:]), x.shape[0], device=x.device)
        for s in segments.unique().tolist():
            members = (segments == s).nonzero()[:, 0]
            rows[s] = members[x[members].argmax(0)]  # of equals the first, and NaN is the largest
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).gather(0, rows)
    weights = x.new_ones(x.shape[0]) if weights is None else weights.to(x.dtype)
    columns = (slice(None),) + (None,) * (x.dim() - 1)
    zeros = x.new_zeros(num_segments, *x.shape[1:])
    out = zeros.index_add(0, segments, x * weights[columns])
    if reduce == "sum":
        return out
    totals = weights.new_zeros(num_segments).index_add(0, segments, weights)
    empty = totals == 0
    return (out / totals.masked_fill(empty, 1)[columns]).masked_fill(empty[columns], 0)


@torch.library.register_fake("mor::segment_reduce")
def _(
    x: Tensor, segments: Tensor, num_segments: int, reduce: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    check(x, segments, num_segments, reduce, weights)
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_totals = num_segments if reduce == "mean" else 0
    return x.new_empty(num_segments, x.shape[1]), x.new_empty(num_totals, dtype=total)


@torch.library.register_fake("mor::segment_reduce_amax_backward")
def _(grad: Tensor, x: Tensor, out: Tensor, segments: Tensor) -> Tensor:
    check_amax_backward(grad, x, out, segments)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, segments, _, ctx.reduce, weights = inputs
    ctx.mark_non_differentiable(output[1])
    amax = ctx.reduce == "amax"
    weighted = weights is not None and ctx.needs_input_grad[4]
    # What no gradient needs is not kept alive.
    ctx.save_for_backward(
        x if amax or weighted else None,
        output[0] if amax or (weighted and ctx.reduce == "mean") else None,
        output[1],
        segments,
        weights,
    )


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, out, totals, segments, weights = ctx.saved_tensors
    if ctx.reduce == "amax":
        grad_x = torch.ops.mor.segment_reduce_amax_backward(grad, x, out, segments)
        return grad_x, None, None, None, None
    factors, share = weights, None
    if ctx.reduce == "mean":
        share = torch.where(totals == 0, 0, 1 / totals)[segments]
        factors = share if weights is None else weights * share
    weighted = weights is not None and ctx.needs_input_grad[4]
    # x_i came in by its factor, and the mean also divides by what weights[i] adds to the total.
    _, grad_x, grad_weights, own = torch.ops.mor.scatter_tokens_backward(
        grad, out, x, segments, factors, totals if out is not None else None, False,
        ctx.needs_input_grad[0],
    )  # fmt: skip
    if weighted and share is not None:
        grad_weights = (grad_weights - own[segments]) * share
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        None,
        None,
        None,
        grad_weights.to(weights.dtype) if weighted else None,
    )


torch.library.register_autograd("mor::segment_reduce", _backward, setup_context=_setup_context)
