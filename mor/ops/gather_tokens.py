"""gather_tokens: take rows of a packed matrix."""

from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect, refuse_non_tensors
from mor.ops._transforms import transformed

__all__ = ["gather_tokens", "reference"]

_operator = torch.ops.mor.gather_tokens.default


def gather_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """Takes rows of a packed matrix: `y[i] = x[rows[i]]`.

    Args:
        x: [N, D] values, or [N] or [N, ...] (trailing dimensions are one row); any dtype;
            differentiable for floating dtypes.
        rows: [K] int64 rows in [0, N), any order; repeats are allowed.

    Returns:
        [K, D] (or [K], or [K, ...]), contiguous. The backward is a deterministic scatter-add in
        float32, one pass where rows never fall (as `route_topk` returns them).

    Raises:
        RuntimeError: wrong rank, dtype or device; on the CPU also a row out of range (undefined
            on CUDA).

    Reference: MoR paper, section 2.2.1 (tokens selected for a recursion step).

    Example:
        >>> gather_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2]))
        tensor([[1.],
                [3.]])
    """
    try:
        if transformed():
            return reference(x, rows)
        if x.dim() == 1:
            return _operator(x.unsqueeze(1), rows).squeeze(1)
        if x.dim() > 2:
            y = _operator(x.flatten(1), rows)
            return y.view(y.shape[0], *x.shape[1:])
        return _operator(x, rows)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(gather_tokens, x=x, rows=rows)
        raise


def reference(x: Tensor, rows: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return x[rows]


@torch.library.register_fake("mor::gather_tokens")
def _(x: Tensor, rows: Tensor) -> Tensor:
    check_operands("gather_tokens", x, rows)
    return x.new_empty(rows.shape[0], x.shape[1])


@torch.library.register_fake("mor::gather_tokens_backward")
def _(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    op = "gather_tokens_backward"
    check_operands(op, grad, rows)
    expect(op, num_rows >= 0, "num_rows >= 0", num_rows)
    return grad.new_empty(num_rows, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.num_rows = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: this will be differentiated
        from mor.ops.scatter_tokens import scatter_tokens  # which needs this file

        return scatter_tokens(grad.new_zeros(ctx.num_rows, grad.shape[1]), grad, rows), None
    return torch.ops.mor.gather_tokens_backward(grad, rows, ctx.num_rows), None


torch.library.register_autograd("mor::gather_tokens", _backward, setup_context=_setup_context)
