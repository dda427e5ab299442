"""Fake kernels and autograd of scatter_tokens."""

from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect
from mor.ops.gather_tokens import gather_tokens


@torch.library.register_fake("mor::scatter_tokens")
def _(
    base: Tensor, updates: Tensor, rows: Tensor, gate: Tensor | None, base_scale: Tensor | None
) -> Tensor:
    check_operands("scatter_tokens", base, rows, updates, gate, base_scale)
    return base.new_empty(base.shape)


@torch.library.register_fake("mor::scatter_tokens_")
def _(
    base: Tensor, updates: Tensor, rows: Tensor, gate: Tensor | None, base_scale: Tensor | None
) -> None:
    op = "scatter_tokens_"
    check_operands(op, base, rows, updates, gate, base_scale)
    expanded = base.numel() > 0 and any(
        size > 1 and step == 0 for size, step in zip(base.shape, base.stride(), strict=True)
    )
    strides = list(base.stride())
    expect(op, not expanded, f"base whose elements do not share memory, got strides {strides}")


@torch.library.register_fake("mor::scatter_tokens_backward")
def _(
    grad: Tensor,
    base: Tensor | None,
    updates: Tensor | None,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    need_base: bool,
    need_updates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "scatter_tokens_backward"
    check_operands(op, grad, rows, base, updates, gate, base_scale)
    expect(
        op, gate is not None or updates is None,
        "gate with updates (they ask for its gradient)", "none",
    )  # fmt: skip
    expect(
        op, base_scale is not None or base is None,
        "base_scale with base (it asks for its gradient)", "none",
    )  # fmt: skip
    none = grad.new_empty
    return (
        grad.new_empty(grad.shape) if need_base and base_scale is not None else none(0),
        grad.new_empty(rows.shape[0], grad.shape[1]) if need_updates else none(0),
        torch.empty_like(gate) if gate is not None and updates is not None else none(0),
        torch.empty_like(base_scale) if base_scale is not None and base is not None else none(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, updates, rows, gate, base_scale = inputs
    # What no gradient needs is not kept alive.
    ctx.save_for_backward(
        base if base_scale is not None and ctx.needs_input_grad[4] else None,
        updates if gate is not None and ctx.needs_input_grad[3] else None,
        rows,
        gate,
        base_scale,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    base, updates, rows, gate, base_scale = ctx.saved_tensors
    need_base, need_updates = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    operands = grad, base, updates, rows, gate, base_scale, need_base, need_updates
    if torch.is_grad_enabled():  # create_graph: this will be differentiated
        return _differentiable_backward(*operands)
    grads = torch.ops.mor.scatter_tokens_backward(*operands)
    grad_base = grad if base_scale is None else grads[0]  # unscaled, it is grad itself
    return (
        grad_base if need_base else None,
        grads[1] if need_updates else None,
        None,
        grads[2] if updates is not None else None,
        grads[3] if base is not None else None,
    )


def _differentiable_backward(
    grad: Tensor,
    base: Tensor | None,
    updates: Tensor | None,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    need_base: bool,
    need_updates: bool,
) -> tuple[Tensor | None, ...]:
    """The same of operations with a derivative; `base` and `updates` ask as in the operator."""
    taken = gather_tokens(grad, rows)
    return (
        scale_rows(grad, base_scale) if need_base else None,
        scale_rows(taken, gate) if need_updates else None,
        None,
        dot_rows(taken, updates).to(gate.dtype)
        if gate is not None and updates is not None
        else None,
        dot_rows(grad, base).to(base_scale.dtype)
        if base_scale is not None and base is not None
        else None,
    )


def scale_rows(x: Tensor, factors: Tensor | None) -> Tensor:
    """Each row times its factor, in the dtype of x; differentiable to any order."""
    return x if factors is None else (x * factors[:, None]).to(x.dtype)


def dot_rows(x: Tensor, y: Tensor) -> Tensor:
    """Products of rows, in float32 (float64 for float64); differentiable to any order."""
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(total) * y.to(total)).sum(1)


torch.library.register_autograd("mor::scatter_tokens", _backward, setup_context=_setup_context)
