"""bipartite_match: for every row the most similar row of another set."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import check_operands, expect, refuse_non_tensors
from mor.ops._transforms import transformed
from mor.ops.gather_tokens import gather_tokens
from mor.ops.scatter_tokens import scatter_tokens

__all__ = ["bipartite_match", "reference"]

_operator = torch.ops.mor.bipartite_match.default


def bipartite_match(
    a: Tensor, b: Tensor, cu_seqlens_a: Tensor, cu_seqlens_b: Tensor, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Finds for every row of `a` the most similar row of `b` in the same sequence.

    The search of token merging (ToMe), without the matrix of similarities: memory is O(Na). Sums
    run in float32 (float64 for float64); bfloat16 rows are not rounded again when normalised.

    Args:
        a: [Na, D] float32, bfloat16, float16 or float64; differentiable.
        b: [Nb, D] as `a`; differentiable.
        cu_seqlens_a: [B + 1] int32; sequence s owns rows `cu_seqlens_a[s]` to
            `cu_seqlens_a[s + 1] - 1` of `a`.
        cu_seqlens_b: [B + 1] int32, the same for `b`.
        metric: "cosine" (0 where a row is all zeros) or "dot".

    Returns:
        scores [Na] float32 (float64 for float64), the largest similarity, and index [Na] int64, the
        row of `b` that has it, of equals the smallest. -inf and -1 for a row whose sequence has no
        row in `b`; a NaN never wins. Gradients of the scores go to the chosen pairs.

    Raises:
        RuntimeError: wrong rank, size, dtype, device or metric; on the CPU also cu_seqlens that do
            not rise from 0 to the number of rows (clamped on CUDA).

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])
        >>> cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
        >>> bipartite_match(a, b, cu_seqlens, cu_seqlens)
        (tensor([1.0000, 0.7071]), tensor([1, 0]))
    """
    try:
        if transformed():
            return reference(a, b, cu_seqlens_a, cu_seqlens_b, metric)
        scores, index = _operator(a, b, cu_seqlens_a, cu_seqlens_b, metric)
        return scores, index
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            bipartite_match, a=a, b=b, cu_seqlens_a=cu_seqlens_a, cu_seqlens_b=cu_seqlens_b
        )
        raise


def reference(
    a: Tensor, b: Tensor, cu_seqlens_a: Tensor, cu_seqlens_b: Tensor, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, one matrix of similarities for each sequence."""
    total = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(total), b.to(total)
    if metric == "cosine":
        a, b = a * _inverse_norms(a)[:, None], b * _inverse_norms(b)[:, None]
    scores, index = [a[:0].sum(1) + b[:0].sum()], [a.new_empty(0, dtype=torch.int64)]
    bounds = pairwise(cu_seqlens_a.tolist()), pairwise(cu_seqlens_b.tolist())
    for (begin, end), (first, last) in zip(*bounds, strict=True):
        rows = a[begin:end]
        if first == last:
            scores.append(rows.new_full((end - begin,), -torch.inf))
            index.append(torch.full((end - begin,), -1, device=a.device))
            continue
        best = (rows @ b[first:last].T).nan_to_num(-torch.inf, torch.inf, -torch.inf).max(1)
        scores.append(best.values)
        index.append(torch.where(best.values == -torch.inf, -1, best.indices + first))
    return torch.cat(scores), torch.cat(index)


def _inverse_norms(x: Tensor) -> Tensor:
    """1 / |x_i|, 0 for rows of zeros, in float32 or float64."""
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.contiguous()  # the sums of vector_norm depend on strides
    norms = torch.linalg.vector_norm(x, dim=1, dtype=total)
    zero = norms == 0
    return (1 / norms.masked_fill(zero, 1)).masked_fill(zero, 0)


@torch.library.register_fake("mor::bipartite_match")
def _(
    a: Tensor, b: Tensor, cu_seqlens_a: Tensor, cu_seqlens_b: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    op = "bipartite_match"
    check_operands(op, a, b, cu_seqlens_a, cu_seqlens_b)
    expect(op, metric in ("cosine", "dot"), "metric cosine or dot", metric)
    total = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty(a.shape[0], dtype=total), a.new_empty(a.shape[0], dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, _, ctx.metric = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    a, b, scores, index = ctx.saved_tensors
    if b.shape[0] == 0:
        return a.new_zeros(a.shape), b.new_zeros(b.shape), None, None, None
    found = index >= 0
    rows = index.clamp(min=0)
    # With s = <a, b> / (|a| |b|): ds/da = b / (|a| |b|) - s / |a|^2 a, and so for b.
    gate = grad.masked_fill(~found, 0)
    scale_a, scale_b = torch.zeros_like(gate), gate.new_zeros(b.shape[0])
    if ctx.metric == "cosine":
        norms_a, norms_b = _inverse_norms(a), _inverse_norms(b)
        pull = gate * scores.masked_fill(~found, 0)
        scale_a = -pull * norms_a.square()
        pulls = scatter_tokens(scale_b[:, None], pull[:, None], rows)[:, 0]
        scale_b = -pulls * norms_b.square()
        gate = gate * norms_a * gather_tokens(norms_b, rows)
    grad_a, grad_b = None, None
    if ctx.needs_input_grad[0]:
        every = torch.arange(a.shape[0], device=a.device)
        grad_a = scatter_tokens(a, gather_tokens(b, rows), every, gate, scale_a)
    if ctx.needs_input_grad[1]:
        grad_b = scatter_tokens(b, a, rows, gate, scale_b)
    return grad_a, grad_b, None, None, None


torch.library.register_autograd("mor::bipartite_match", _backward, setup_context=_setup_context)
