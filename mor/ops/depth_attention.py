"""depth_attention: attention over packed sequences, restricted by position and depth."""

import torch
from torch import Tensor

import mor.ops._depth_attention_rules  # noqa: F401  (registers fake kernels and autograd)
from mor.ops._checks import refuse_non_tensors
from mor.ops._transforms import transformed

__all__ = ["depth_attention", "reference"]

_operator = torch.ops.mor.depth_attention.default


def depth_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    q_depths: Tensor | None = None,
    k_depths: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees key j of its own sequence iff position and depth allow it.

    Visible means: `k_positions[j] <= q_positions[i]` (if `causal`), `q_positions[i] -
    k_positions[j] < window` (if given) and `k_depths[j] >= q_depths[i]` (if depths are given). No
    S x S mask exists; extra memory is O(rows). Keys outside every window and unused cache slots at
    the end of a sequence, of position 2**63 - 1, cost nothing.

    Args:
        q: [Nq, H, head_dim] queries, float32, bfloat16, float16 or float64; head_dim 1 to 256.
        k: [Nk, Hkv, head_dim] keys; H is a multiple of Hkv (grouped-query attention).
        v: [Nk, Hkv, head_dim] values.
        q_positions: [Nq] int64, must not fall inside a sequence.
        k_positions: [Nk] int64, must not fall inside a sequence.
        cu_seqlens_q: [B + 1] int32; sequence b owns query rows `cu[b] .. cu[b + 1] - 1`.
        cu_seqlens_k: [B + 1] int32, the same for keys.
        q_depths: [Nq] int32 recursion step of each query; with `k_depths` or not at all.
        k_depths: [Nk] int32 last recursion step that each key takes part in.
        key_bias: [Nk] float32 (float64 for float64), added to every scaled score of a key.
        causal: whether positions restrict.
        scale: factor of the scores, by default head_dim**-0.5.
        window: positions that a query sees, its own included, at least 1; needs `causal`.

    Returns:
        out [Nq, H, head_dim], differentiable in q, k, v and key_bias, and softmax_lse [H, Nq]
        float32 (float64 for float64), which is not. A query that sees no key gives 0 and -inf.

    Raises:
        RuntimeError: wrong rank, size, dtype, device or window; on the CPU also falling positions
            or wrong `cu_seqlens` (undefined on CUDA).

    Under autocast q, k and v are cast to its dtype.

    Reference: MoR paper, section 2.2.2 (recursion-wise caching and recursive KV sharing).

    Example:
        >>> q, k, v = torch.zeros(1, 1, 2), torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
        >>> cu_q, cu_k = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
        >>> depth_attention(q, k, v, torch.tensor([1]), torch.tensor([0, 1]), cu_q, cu_k)[0]
        tensor([[[1., 1.]]])
    """
    try:
        if torch.is_autocast_enabled(q.device.type):  # as scaled_dot_product_attention
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if transformed():
            return reference(
                q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths=q_depths,
                k_depths=k_depths, key_bias=key_bias, causal=causal, scale=scale, window=window,
            )  # fmt: skip
        if scale is None:
            # A wrong rank is refused below.
            scale = max(q.shape[-1], 1) ** -0.5 if q.dim() == 3 else 1.0
        return _operator(
            q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths, k_depths,
            key_bias, causal, scale, window,
        )  # fmt: skip
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            depth_attention,
            q=q,
            k=k,
            v=v,
            q_positions=q_positions,
            k_positions=k_positions,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            q_depths=q_depths,
            k_depths=k_depths,
            key_bias=key_bias,
        )
        raise


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, q_depths: Tensor | None = None,
    k_depths: Tensor | None = None, key_bias: Tensor | None = None, causal: bool = True,
    scale: float | None = None, window: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, one dense mask, softmax in float32 as Transformers does it."""
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = scores.to(total) if key_bias is None else scores + key_bias
    rows = [
        torch.bucketize(torch.arange(n, device=q.device), cu[1:].long(), right=True)
        for n, cu in ((q.shape[0], cu_seqlens_q), (k.shape[0], cu_seqlens_k))
    ]
    visible = rows[0][:, None] == rows[1]
    if causal:
        visible = visible & (k_positions <= q_positions[:, None])
    if window is not None:
        visible = visible & (k_positions > q_positions[:, None] - window)
    if q_depths is not None and k_depths is not None:
        visible = visible & (k_depths >= q_depths[:, None])
    if key_bias is not None:
        visible = visible & (key_bias > -torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0).to(q.dtype)
    return torch.einsum("hij,jhd->ihd", weights, v), scores.detach().logsumexp(-1)
