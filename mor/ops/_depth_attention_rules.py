"""Fake kernels and autograd of depth_attention."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mor.ops._checks import check_head_dim, check_operands, expect


def _check(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    """Checks the operands of depth_attention, in the order of the schema."""
    op = "depth_attention"
    q_depths, k_depths, _, causal, _, *window = rest[4:]
    check_head_dim(op, q, 3)
    check_operands(op, q, k, v, *rest[:7])
    kv_heads = k.shape[1]
    multiple = kv_heads > 0 and q.shape[1] % kv_heads == 0
    expect(op, multiple, f"the {q.shape[1]} heads of q to be a multiple of those of k", kv_heads)
    only = "only k_depths" if q_depths is None else "only q_depths"
    expect(op, (q_depths is None) == (k_depths is None), "q_depths and k_depths together", only)
    for size in window:  # left out where it is the default
        if size is not None:
            expect(op, size >= 1, "a window of at least 1", size)
            expect(op, causal, "causal with a window", f"causal={causal}")


@torch.library.register_fake("mor::depth_attention")
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(q, *rest)
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=total)


@torch.library.register_fake("mor::depth_attention_backward")
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Any:
    _check(q, k, v, *rest)
    check_operands("depth_attention_backward", q, grad_out, out, lse)
    bias = rest[6]
    grad_bias = q.new_empty(0, dtype=lse.dtype) if bias is None else bias.new_empty(bias.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v)), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing lets it be read a single time
    if torch.is_grad_enabled():  # create_graph: this will be differentiated
        return _differentiable_backward(ctx, grad, *saved)
    *grads, grad_bias = torch.ops.mor.depth_attention_backward(
        grad, *saved, ctx.causal, ctx.scale, ctx.window
    )
    bias = None if saved[-1] is None else grad_bias
    return *grads, *(None,) * 6, bias, None, None, None


def _differentiable_backward(
    ctx: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """The gradient of the reference, sequence by sequence: a dense matrix of scores for each."""
    from mor.ops.depth_attention import reference  # which needs this file

    q_positions, k_positions, cu_q, cu_k, q_depths, k_depths, key_bias = rest
    total = lse.dtype
    # Aliases: a key that was computed from a query is no part of the query's gradient.
    operands = [None if t is None else t.view_as(t) for t in (q, k, v, key_bias)]
    q, k, v = (t.to(total) for t in operands[:3] if t is not None)
    bias = operands[3]
    outs = [q[:0]]
    for (a, b), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        of_q, of_k = slice(a, b), slice(first, last)
        outs.append(
            reference(
                q[of_q], k[of_k], v[of_k], q_positions[of_q], k_positions[of_k],
                cu_q.new_tensor([0, b - a]), cu_k.new_tensor([0, last - first]),
                q_depths=None if q_depths is None else q_depths[of_q],
                k_depths=None if k_depths is None else k_depths[of_k],
                key_bias=None if bias is None else bias[of_k],
                causal=ctx.causal, scale=ctx.scale, window=ctx.window,
            )[0]
        )  # fmt: skip
    wanted = [t for t in operands if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            torch.cat(outs), wanted, grad.to(total), create_graph=True, materialize_grads=True
        )
    )
    grads = [next(found) if t is not None and t.requires_grad else None for t in operands]
    return *grads[:3], *(None,) * 6, grads[3], None, None, None


torch.library.register_autograd("mor::depth_attention", _backward, setup_context=_setup_context)
