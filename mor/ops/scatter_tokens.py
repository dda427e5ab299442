"""scatter_tokens: add gated rows to a packed matrix."""

import torch
from torch import Tensor

import mor.ops._scatter_tokens_rules  # noqa: F401  (registers fake kernels and autograd)
from mor.ops._checks import refuse_gradients, refuse_non_tensors
from mor.ops._transforms import transformed

__all__ = ["reference", "scatter_tokens", "scatter_tokens_"]

_operator = torch.ops.mor.scatter_tokens.default
_operator_ = torch.ops.mor.scatter_tokens_.default


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
    try:
        if transformed():
            return reference(base, updates, rows, gate, base_scale)
        return _operator(base, updates, rows, gate, base_scale)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            scatter_tokens, base=base, updates=updates, rows=rows, gate=gate, base_scale=base_scale
        )
        raise


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
    try:
        refuse_gradients(
            "scatter_tokens_", "scatter_tokens, or torch.no_grad()",
            base=base, updates=updates, gate=gate, base_scale=base_scale,
        )  # fmt: skip
        _operator_(base, updates, rows, gate, base_scale)
        return base
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            scatter_tokens_, base=base, updates=updates, rows=rows, gate=gate, base_scale=base_scale
        )
        raise


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
