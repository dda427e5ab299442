"""gather_tokens: take rows of a packed matrix."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_tokens", "reference"]


def gather_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """Takes rows of a packed matrix: `y[i] = x[rows[i]]`.

    Args:
        x: [N, D] values, any dtype; differentiable for floating dtypes.
        rows: [K] int64 rows in [0, N), any order; repeats are allowed.

    Returns:
        [K, D], contiguous. The backward is a deterministic scatter-add in float32.

    Raises:
        RuntimeError: wrong rank, dtype or device; on the CPU also a row out of range (undefined on CUDA).

    Reference: MoR paper, section 2.2.1 (tokens selected for a recursion step).

    Example:
        >>> gather_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2]))
        tensor([[1.],
                [3.]])
    """
    return torch.ops.mor.gather_tokens(x, rows)


def reference(x: Tensor, rows: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return x[rows]


def _check(x: Tensor, rows: Tensor) -> None:
    torch._check(
        x.dim() == 2, lambda: f"gather_tokens: expected x of shape [N, D], got {list(x.shape)}"
    )
    torch._check(
        rows.dim() == 1,
        lambda: f"gather_tokens: expected rows of shape [K], got {list(rows.shape)}",
    )


@torch.library.register_fake("mor::gather_tokens")
def _(x: Tensor, rows: Tensor) -> Tensor:
    _check(x, rows)
    return x.new_empty(rows.shape[0], x.shape[1])


@torch.library.register_fake("mor::gather_tokens_backward")
def _(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.num_rows = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    return torch.ops.mor.gather_tokens_backward(grad, rows, ctx.num_rows), None


torch.library.register_autograd("mor::gather_tokens", _backward, setup_context=_setup_context)
