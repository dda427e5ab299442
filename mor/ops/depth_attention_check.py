"""What csrc/ops/depth_attention.h checks, again for fake tensors and with the same wording."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["check", "check_backward"]


def expect(condition: Any, text: str, got: Any, op: str = "depth_attention") -> None:
    """Refuses unless `condition`, in the words of the C++ checks."""
    torch._check(condition, lambda: f"{op}: expected {text}, got {got}")


def check(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    """Checks the operands of depth_attention, in the order of the schema."""
    q_positions, k_positions, cu_q, cu_k, q_depths, k_depths, key_bias, causal, _, *window = rest

    def expect_vector(t: Tensor, name: str, shape: str, size: Any, dtype: torch.dtype) -> None:
        expect(t.dim() == 1, f"{name} of shape {shape}", list(t.shape))
        expect(t.dtype == dtype, f"{name} of dtype {dtype}", t.dtype)
        expect(t.device == q.device, f"{name} on {q.device}", t.device)
        expect(t.shape[0] == size, f"{name} of {size} elements", list(t.shape))

    expect(q.dim() == 3, "q of shape [Nq, H, head_dim]", list(q.shape))
    expect(q.dtype.is_floating_point, "q of dtype float32, bfloat16, float16 or float64", q.dtype)
    for t, name in ((k, "k"), (v, "v")):
        expect(t.dim() == 3, f"{name} of shape [Nk, Hkv, head_dim]", list(t.shape))
        expect(t.dtype == q.dtype, f"{name} of dtype {q.dtype}", t.dtype)
        expect(t.device == q.device, f"{name} on {q.device}", t.device)
    head_dim = q.shape[2]
    expect(1 <= head_dim <= 256, "head_dim in 1..256", head_dim)
    expect(k.shape[2] == head_dim, f"k with head_dim {head_dim}", list(k.shape))
    expect(v.shape == k.shape, f"v of the shape of k {list(k.shape)}", list(v.shape))
    kv_heads = k.shape[1]
    multiple = kv_heads > 0 and q.shape[1] % kv_heads == 0
    expect(multiple, f"the {q.shape[1]} heads of q to be a multiple of those of k", kv_heads)
    expect_vector(q_positions, "q_positions", "[Nq]", q.shape[0], torch.int64)
    expect_vector(k_positions, "k_positions", "[Nk]", k.shape[0], torch.int64)
    rows = cu_q.shape[0] if cu_q.dim() == 1 else 1
    expect(rows >= 1, "cu_seqlens_q of at least one element", list(cu_q.shape))
    expect_vector(cu_q, "cu_seqlens_q", "[B + 1]", rows, torch.int32)
    expect_vector(cu_k, "cu_seqlens_k", "[B + 1]", rows, torch.int32)
    only = "only k_depths" if q_depths is None else "only q_depths"
    expect((q_depths is None) == (k_depths is None), "q_depths and k_depths together", only)
    if q_depths is not None:
        expect_vector(q_depths, "q_depths", "[Nq]", q.shape[0], torch.int32)
        expect_vector(k_depths, "k_depths", "[Nk]", k.shape[0], torch.int32)
    if key_bias is not None:
        total = torch.float64 if q.dtype == torch.float64 else torch.float32
        expect_vector(key_bias, "key_bias", "[Nk]", k.shape[0], total)
    for size in window:  # left out where it is the default
        if size is not None:
            expect(size >= 1, "a window of at least 1", size)
            expect(causal, "causal with a window", f"causal={causal}")


def check_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> None:
    """Checks the operands of depth_attention_backward."""
    op = "depth_attention_backward"
    check(q, k, v, *rest)
    for t, name in ((grad_out, "grad_out"), (out, "out")):
        expect(t.dim() == 3, f"{name} of shape [Nq, H, head_dim]", list(t.shape), op)
        expect(t.dtype == q.dtype, f"{name} of dtype {q.dtype}", t.dtype, op)
        expect(t.device == q.device, f"{name} on {q.device}", t.device, op)
        expect(t.shape == q.shape, f"{name} of the shape of q {list(q.shape)}", list(t.shape), op)
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    expect(lse.dim() == 2, "softmax_lse of shape [H, Nq]", list(lse.shape), op)
    expect(lse.dtype == total, f"softmax_lse of dtype {total}", lse.dtype, op)
    expect(lse.device == q.device, f"softmax_lse on {q.device}", lse.device, op)
    shape = [q.shape[1], q.shape[0]]
    expect(list(lse.shape) == shape, f"softmax_lse of shape {shape}", list(lse.shape), op)
