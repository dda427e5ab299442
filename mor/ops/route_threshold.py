"""route_threshold: the rows of every packed sequence that reach a threshold."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import refuse_non_tensors
from mor.ops.route_threshold_check import check

__all__ = ["reference", "route_threshold"]

_operator = torch.ops.mor.route_threshold.default


def route_threshold(
    scores: Tensor,
    threshold: float | Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "absolute",
    inclusive: bool = False,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses the rows of every packed sequence that reach a threshold: not always as many.

    Each sequence is cut on its own. Its rows are ranked as `route_topk` ranks them (in float32, of
    equal scores the smaller row first), and the best c are chosen; `kind` says how many pass.

    Args:
        scores: [N] float32, bfloat16, float16 or float64. Not differentiable.
        threshold: of every sequence, or [B] float32 or float64, one for each.
        cu_seqlens: [B + 1] int32; sequence b owns rows `cu_seqlens[b]` to `cu_seqlens[b + 1] - 1`.
        kind: "absolute", scores above `threshold`; "quantile", scores above
            `torch.quantile(scores, threshold)` of the sequence (linear interpolation); "mass",
            scores are weights, and the fewest best rows pass whose sum is at least `threshold`
            times the sum of all (top-p). Sums are exact: weights count in multiples of about
            n * 2^-50 of the largest, and a smaller one is 0.
        inclusive: >= instead of >, for the first two kinds.
        min_k: where fewer pass, the best `min_k` are chosen (all, if there are not so many).
        max_k: where more pass, the best `max_k` are chosen; None: no bound.
        candidates: [N] bool; only these rows compete, and count for quantile and mass.
        max_rows: length of the first result, whose end is filled with -1. Left out, it is as long
            as there are rows: on CUDA that waits for the device once, and `torch.compile` needs
            `torch._dynamo.config.capture_dynamic_output_shape_ops`. Given, neither;
            B * max_k and N are bounds that always suffice.

    Returns:
        int64 rows, sequence after sequence, ascending, and the [B + 1] int32 `cu_seqlens` of what
        was chosen; always the same ones.

    Raises:
        RuntimeError: wrong rank, dtype, device or size, threshold out of range. On the CPU also a
            NaN that competes, a weight that is negative or infinite, a bad value in a threshold
            tensor or in cu_seqlens, and more than `max_rows` rows; on CUDA NaN ranks lowest, such
            weights count as 0, and rows that do not fit are dropped.

    Example:
        >>> scores, cu_seqlens = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([0, 2, 4]).int()
        >>> route_threshold(scores, 0.6, cu_seqlens)
        (tensor([1, 3]), tensor([0, 1, 2], dtype=torch.int32))
        >>> route_threshold(scores, 0.8, cu_seqlens, kind="mass")
        (tensor([1, 2, 3]), tensor([0, 1, 3], dtype=torch.int32))
    """
    try:
        each = threshold if isinstance(threshold, Tensor) else None
        one = 0.0 if isinstance(threshold, Tensor) else threshold
        most = -1 if max_k is None else max_k
        rows, chosen = _operator(
            scores, one, each, cu_seqlens, kind, inclusive, min_k, most, candidates, max_rows
        )
        return rows, chosen
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            route_threshold, scores=scores, cu_seqlens=cu_seqlens, candidates=candidates
        )
        raise


def reference(
    scores: Tensor,
    threshold: float | Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "absolute",
    inclusive: bool = False,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, a stable sort for each sequence; NaN ranks lowest."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    bounds, parts, counts = cu_seqlens.tolist(), [], [0]
    for b, (begin, end) in enumerate(pairwise(bounds)):
        rows = torch.arange(begin, end, device=scores.device)
        rows = rows if candidates is None else rows[candidates[rows]]
        rows = rows[scores[rows].nan_to_num(-torch.inf).sort(stable=True, descending=True).indices]
        rows = rows[scores[rows].isnan().sort(stable=True).indices]
        limit = (
            threshold[b]
            if isinstance(threshold, Tensor)
            else scores.new_tensor(threshold, dtype=torch.float64)
        )
        count = _count(scores[rows], limit, kind, inclusive) if len(rows) else 0
        count = max(count, min_k) if max_k is None else min(max(count, min_k), max_k)
        parts.append(rows[:count].sort().values)
        counts.append(len(parts[-1]))
    rows = torch.cat([torch.arange(0, device=scores.device), *parts])
    if max_rows is not None:
        rows = torch.nn.functional.pad(rows, (0, max_rows - len(rows)), value=-1)
    return rows, torch.tensor(counts, device=scores.device).cumsum(0).int()


def _count(best_first: Tensor, limit: Tensor, kind: str, inclusive: bool) -> int:
    """How many of the scores, best first, pass."""
    if kind == "mass":
        n, largest = len(best_first), best_first[0].item()
        if largest == 0:
            return 0
        scale = 50 - math.ceil(math.log2(n)) - (math.frexp(largest)[1] - 1)
        weights = torch.tensor([round(math.ldexp(w, scale)) for w in best_first.tolist()])
        wanted = math.ceil(limit.item() * weights.sum().item())
        return int((weights.cumsum(0) - weights < wanted).sum())
    limit = limit.to(best_first.dtype)
    if kind == "quantile":
        near = "higher" if inclusive else "lower"  # what linear interpolation comes to
        limit = torch.quantile(best_first, limit, interpolation=near)
    return int((best_first >= limit if inclusive else best_first > limit).sum())


@torch.library.register_fake("mor::route_threshold")
def _(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_sequences, max_rows = check(scores, *rest), rest[-1]
    size = torch.library.get_ctx().new_dynamic_size() if max_rows is None else max_rows
    return (
        scores.new_empty(size, dtype=torch.int64),
        scores.new_empty(num_sequences + 1, dtype=torch.int32),
    )
