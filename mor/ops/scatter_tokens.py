"""scatter_tokens: add gated rows to a packed matrix."""

from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import (
    FLOATING,
    check_dim,
    check_dtype,
    check_rows_index,
    check_same_device,
    dtype_str,
)

__all__ = ["reference", "scatter_tokens", "scatter_tokens_"]


def scatter_tokens(
    base: Tensor,
    updates: Tensor,
    rows: Tensor,
    gate: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> Tensor:
    """Adds gated rows: `out = base_scale * base`, then `out[rows[i]] += gate[i] * updates[i]`.

    Sums run in float32 (float64 for float64) and are rounded once; repeated rows are added in the
    order of i, so the result is always the same. Every floating operand is differentiable.

    Args:
        base: [N, D] float32, bfloat16, float16 or float64.
        updates: [K, D] as `base`.
        rows: [K] int64 rows in [0, N), any order; repeats are allowed. Rows that never fall (as
            `route_topk` returns them) are the fast path.
        gate: [K] float32 or the dtype of `base`; None stands for ones.
        base_scale: [N] float32 or the dtype of `base`; None stands for ones.

    Returns:
        [N, D], contiguous, a new tensor. Without gradients `scatter_tokens_` is several times
        faster: it touches only the rows it changes.

    Raises:
        RuntimeError: wrong rank, size, dtype or device; on the CPU also a row out of range
            (undefined on CUDA).

    Reference: MoR paper, section 2.2.1 (H += g * f(H) over the selected tokens).

    Example:
        >>> base, updates = torch.zeros(3, 2), torch.ones(2, 2)
        >>> scatter_tokens(base, updates, torch.tensor([0, 2]), gate=torch.tensor([0.5, 2.0]))
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000],
                [2.0000, 2.0000]])
    """
    return torch.ops.mor.scatter_tokens(base, updates, rows, gate, base_scale)


def scatter_tokens_(
    base: Tensor,
    updates: Tensor,
    rows: Tensor,
    gate: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> Tensor:
    """`scatter_tokens` written into `base`, which is returned.

    No other operand may share memory with `base`.

    Raises:
        RuntimeError: as `scatter_tokens`; also where a gradient would be needed: there is none.
    """
    if torch.is_grad_enabled():
        operands = {"base": base, "updates": updates, "gate": gate, "base_scale": base_scale}
        for name, t in operands.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"scatter_tokens_: expected operands that need no gradient, got {name} with "
                    "requires_grad; use scatter_tokens, or torch.no_grad()"
                )
    torch.ops.mor.scatter_tokens_(base, updates, rows, gate, base_scale)
    return base


def reference(
    base: Tensor,
    updates: Tensor,
    rows: Tensor,
    gate: Tensor | None = None,
    base_scale: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in the dtype of base."""
    scaled = base if base_scale is None else base * base_scale[:, None].to(base.dtype)
    gated = updates if gate is None else updates * gate[:, None].to(updates.dtype)
    return scaled.index_add(0, rows, gated)


def _check_rows_like(
    t: Tensor, num_rows: int, like: Tensor, op: str, name: str, shape: str
) -> None:
    check_dim(t, 2, op, name, shape)
    check_dtype(t, (like.dtype,), dtype_str(like.dtype), op, name)
    check_same_device(t, like, op, name)
    torch._check(
        t.shape[0] == num_rows and t.shape[1] == like.shape[1],
        lambda: (
            f"{op}: expected {name} of shape [{num_rows}, {like.shape[1]}], got {list(t.shape)}"
        ),
    )


def _check_scale(t: Tensor, size: int, like: Tensor, op: str, name: str, shape: str) -> None:
    check_dim(t, 1, op, name, shape)
    check_dtype(t, (torch.float32, like.dtype), f"Float or {dtype_str(like.dtype)}", op, name)
    check_same_device(t, like, op, name)
    torch._check(
        t.shape[0] == size,
        lambda: f"{op}: expected {name} of {size} elements, got {list(t.shape)}",
    )


def _check(
    target: Tensor,
    updates: Tensor | None,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    op: str,
    target_name: str = "base",
) -> None:
    check_dim(target, 2, op, target_name, "[N, D]")
    check_dtype(target, FLOATING, "float32, bfloat16, float16 or float64", op, target_name)
    check_rows_index(rows, target, op)
    if updates is not None:
        _check_rows_like(updates, rows.shape[0], target, op, "updates", "[K, D]")
    if gate is not None:
        _check_scale(gate, rows.shape[0], target, op, "gate", "[K]")
    if base_scale is not None:
        _check_scale(base_scale, target.shape[0], target, op, "base_scale", "[N]")


@torch.library.register_fake("mor::scatter_tokens")
def _(
    base: Tensor, updates: Tensor, rows: Tensor, gate: Tensor | None, base_scale: Tensor | None
) -> Tensor:
    _check(base, updates, rows, gate, base_scale, "scatter_tokens")
    return base.new_empty(base.shape)


@torch.library.register_fake("mor::scatter_tokens_")
def _(
    base: Tensor, updates: Tensor, rows: Tensor, gate: Tensor | None, base_scale: Tensor | None
) -> None:
    op = "scatter_tokens_"
    _check(base, updates, rows, gate, base_scale, op)
    expanded = any(
        size > 1 and step == 0 for size, step in zip(base.shape, base.stride(), strict=True)
    )
    torch._check(
        not expanded,
        lambda: (
            f"{op}: expected base whose elements do not share memory, got strides "
            f"{list(base.stride())}"
        ),
    )


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
    _check(grad, updates, rows, gate, base_scale, op, "grad")
    if base is not None:
        _check_rows_like(base, grad.shape[0], grad, op, "base", "[N, D]")
    torch._check(
        gate is not None or updates is None,
        lambda: f"{op}: expected gate with updates (they ask for its gradient), got none",
    )
    torch._check(
        base_scale is not None or base is None,
        lambda: f"{op}: expected base_scale with base (it asks for its gradient), got none",
    )
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
    grads = torch.ops.mor.scatter_tokens_backward(
        grad, base, updates, rows, gate, base_scale, need_base, need_updates
    )
    grad_base = grad if base_scale is None else grads[0]  # unscaled, it is grad itself
    return (
        grad_base if need_base else None,
        grads[1] if need_updates else None,
        None,
        grads[2] if updates is not None else None,
        grads[3] if base is not None else None,
    )


torch.library.register_autograd("mor::scatter_tokens", _backward, setup_context=_setup_context)
