"""Fake kernels and autograd of segment_reduce."""

from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect
from mor.ops._scatter_tokens_rules import dot_rows, scale_rows
from mor.ops.gather_tokens import gather_tokens
from mor.ops.scatter_tokens import scatter_tokens


@torch.library.register_fake("mor::segment_reduce")
def _(
    x: Tensor, segments: Tensor, num_segments: int, reduce: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    op = "segment_reduce"
    check_operands(op, x, segments, weights)
    expect(op, num_segments >= 0, "num_segments >= 0", num_segments)
    expect(op, reduce in ("sum", "mean", "amax"), "reduce sum, mean or amax", reduce)
    expect(op, reduce != "amax" or weights is None, "no weights with amax")
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_totals = num_segments if reduce == "mean" else 0
    return x.new_empty(num_segments, x.shape[1]), x.new_empty(num_totals, dtype=total)


@torch.library.register_fake("mor::segment_reduce_amax_backward")
def _(grad: Tensor, x: Tensor, out: Tensor, segments: Tensor) -> Tensor:
    check_operands("segment_reduce_amax_backward", grad, out, x, segments)
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
    if torch.is_grad_enabled():  # create_graph: this will be differentiated
        return _differentiable_backward(ctx, grad)
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


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same of operations with a derivative."""
    x, out, _, segments, weights = ctx.saved_tensors
    taken = gather_tokens(grad, segments)
    if ctx.reduce == "amax":
        ones = grad.new_ones(out.shape)
        with torch.no_grad():
            chosen = torch.ops.mor.segment_reduce_amax_backward(ones, x, out, segments)
        return taken * chosen, None, None, None, None
    factors, share = weights, None
    if ctx.reduce == "mean":
        total = torch.float64 if grad.dtype == torch.float64 else torch.float32
        own = taken.new_ones(taken.shape[0], dtype=total) if weights is None else weights.to(total)
        totals = scatter_tokens(own.new_zeros(grad.shape[0], 1), own[:, None], segments)[:, 0]
        empty = totals == 0
        share = gather_tokens((1 / totals.masked_fill(empty, 1)).masked_fill(empty, 0), segments)
        factors = own * share
    grad_x = scale_rows(taken, factors) if ctx.needs_input_grad[0] else None
    if weights is None or not ctx.needs_input_grad[4]:
        return grad_x, None, None, None, None
    if share is None:
        return grad_x, None, None, None, dot_rows(taken, x).to(weights.dtype)
    grad_weights = share * (dot_rows(taken, x) - dot_rows(taken, gather_tokens(out, segments)))
    return grad_x, None, None, None, grad_weights.to(weights.dtype)


torch.library.register_autograd("mor::segment_reduce", _backward, setup_context=_setup_context)
