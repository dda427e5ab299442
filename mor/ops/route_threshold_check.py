"""The checks of csrc/ops/route_threshold.h for its fake kernel."""

from torch import Tensor

from mor.ops._checks import check_operands, expect

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
    check_operands(op, scores, cu_seqlens, threshold_each, candidates)
    kinds = kind in ("absolute", "quantile", "mass")
    expect(op, kinds, "kind absolute, quantile or mass", kind)
    expect(op, not (inclusive and kind == "mass"), "kind absolute or quantile with inclusive")
    if threshold_each is None and absolute:
        expect(op, threshold == threshold, "threshold not to be nan")
    elif threshold_each is None:
        expect(op, 0 <= threshold <= 1, "threshold in [0, 1]", threshold)
    expect(op, min_k >= 0, "min_k >= 0", min_k)
    expect(op, max_k == -1 or max_k >= min_k, f"max_k >= min_k = {min_k}", max_k)
    expect(op, max_rows is None or max_rows >= 0, "max_rows >= 0", max_rows)
    return cu_seqlens.shape[0] - 1
