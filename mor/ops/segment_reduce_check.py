"""The checks of csrc/ops/segment_reduce.h for its fake kernels."""

import torch
from torch import Tensor

from mor.ops._checks import FLOATING, check_dim, check_dtype, check_same_device, check_size
from mor.ops._scatter_tokens_rules import check_rows_like, check_scale

__all__ = ["check", "check_amax_backward"]


def check(
    x: Tensor, segments: Tensor, num_segments: int, reduce: str, weights: Tensor | None
) -> None:
    """Everything but values."""
    op = "segment_reduce"
    check_dim(x, 2, op, "x", "[N, D]")
    check_dtype(x, FLOATING, "float32, bfloat16, float16 or float64", op, "x")
    _check_segments(segments, x, op)
    torch._check(num_segments >= 0, lambda: f"{op}: expected num_segments >= 0, got {num_segments}")
    torch._check(
        reduce in ("sum", "mean", "amax"),
        lambda: f"{op}: expected reduce sum, mean or amax, got {reduce}",
    )
    torch._check(
        reduce != "amax" or weights is None, lambda: f"{op}: expected no weights with amax"
    )
    if weights is not None:
        check_scale(weights, x.shape[0], x, op, "weights", "[N]")


def check_amax_backward(grad: Tensor, x: Tensor, out: Tensor, segments: Tensor) -> None:
    """The same for the backward of amax."""
    op = "segment_reduce_amax_backward"
    check_dim(grad, 2, op, "grad", "[S, D]")
    check_dtype(grad, FLOATING, "float32, bfloat16, float16 or float64", op, "grad")
    check_rows_like(out, grad.shape[0], grad, op, "out", "[S, D]")
    check_dim(x, 2, op, "x", "[N, D]")
    check_rows_like(x, x.shape[0], grad, op, "x", "[N, D]")
    _check_segments(segments, x, op)


def _check_segments(segments: Tensor, x: Tensor, op: str) -> None:
    check_dim(segments, 1, op, "segments", "[N]")
    check_dtype(segments, (torch.int64,), "int64", op, "segments")
    check_same_device(segments, x, op, "segments")
    check_size(segments, x.shape[0], "the rows of x", op, "segments")
