"""The checks of csrc/ops/route_threshold.h for its fake kernel."""

import torch
from torch import Tensor

from mor.ops._checks import (
    FLOATING,
    check_cu_seqlens,
    check_dim,
    check_dtype,
    check_row_mask,
    check_same_device,
    check_size,
)

__all__ = ["check"]


def check(
    scores: Tensor,
    threshold: float,
    threshold_each: Tensor | None,
    cu_seqlens: Tensor,
    kind: str,
    inclusive: bool,
    min_k: int,
    max_k: int,
    candidates: Tensor | None,
    max_rows: int | None,
) -> int:
    """Everything but values; returns B."""
    op, absolute = "route_threshold", kind == "absolute"
    check_dim(scores, 1, op, "scores", "[N]")
    check_dtype(scores, FLOATING, "float32, bfloat16, float16 or float64", op, "scores")
    num_sequences = check_cu_seqlens(cu_seqlens, scores, op)
    torch._check(
        kind in ("absolute", "quantile", "mass"),
        lambda: f"{op}: expected kind absolute, quantile or mass, got {kind}",
    )
    torch._check(
        not (inclusive and kind == "mass"),
        lambda: f"{op}: expected kind absolute or quantile with inclusive",
    )
    if threshold_each is not None:
        check_dim(threshold_each, 1, op, "threshold", "[B]")
        check_dtype(
            threshold_each, (torch.float32, torch.float64), "float32 or float64", op, "threshold"
        )
        check_same_device(threshold_each, scores, op, "threshold")
        check_size(threshold_each, num_sequences, "one for each sequence", op, "threshold")
    elif absolute:
        torch._check(threshold == threshold, lambda: f"{op}: expected threshold not to be nan")
    else:
        torch._check(
            0 <= threshold <= 1, lambda: f"{op}: expected threshold in [0, 1], got {threshold}"
        )
    torch._check(min_k >= 0, lambda: f"{op}: expected min_k >= 0, got {min_k}")
    torch._check(
        max_k == -1 or max_k >= min_k,
        lambda: f"{op}: expected max_k >= min_k = {min_k}, got {max_k}",
    )
    if candidates is not None:
        check_row_mask(candidates, scores, op, "candidates")
    torch._check(
        max_rows is None or max_rows >= 0, lambda: f"{op}: expected max_rows >= 0, got {max_rows}"
    )
    return num_sequences
