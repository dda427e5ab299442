"""segment_reduce: rows that share a destination become one."""

import torch
from torch import Tensor

import mor.ops._segment_reduce_rules  # noqa: F401  (registers fake kernels and autograd)
from mor.ops._checks import refuse_non_tensors
from mor.ops._transforms import transformed

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
    try:
        if transformed():
            return reference(x, segments, num_segments, reduce, weights)
        rows = x.unsqueeze(1) if x.dim() == 1 else x.flatten(1) if x.dim() > 2 else x
        out, _ = _operator(rows, segments, num_segments, reduce, weights)
        return out if x.dim() == 2 else out.view(num_segments, *x.shape[1:])
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(segment_reduce, x=x, segments=segments, weights=weights)
        raise


def reference(
    x: Tensor,
    segments: Tensor,
    num_segments: int,
    reduce: str = "sum",
    weights: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in the dtype of x."""
    if reduce == "amax":
        nowhere, found = torch.full(x.shape[1:], x.shape[0], device=x.device), {}
        for s in segments.unique().tolist():
            members = (segments == s).nonzero()[:, 0]
            found[s] = members[x[members].argmax(0)]  # of equals the first, and NaN is the largest
        rows = torch.stack([nowhere, *(found.get(s, nowhere) for s in range(num_segments))])[1:]
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
