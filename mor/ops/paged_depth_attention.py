"""paged_depth_attention: attention over entries of a paged key/value cache."""

import torch
from torch import Tensor

from mor.ops._checks import (
    check_head_dim,
    check_kv_cache,
    check_operands,
    expect,
    refuse_gradients,
    refuse_non_tensors,
)

__all__ = ["paged_depth_attention", "reference"]

_operator = torch.ops.mor.paged_depth_attention.default


def paged_depth_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    context_starts: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees the first `context_lens[i]` cached keys of its entry.

    An entry is one (sequence, recursion or layer) pair with a row of `block_table`, so rows at
    different recursion depths are served by one call. Decoding has one query an entry, which sees
    all its keys; prefill in chunks a bound that rises; recursive KV sharing the position + 1. Keys
    that no query sees cost nothing.

    Args:
        q: [N, H, head_dim] queries in the dtype of the caches; head_dim 1 to 256.
        k_cache: [num_blocks, block_size, Hkv, head_dim] float32, bfloat16, float16 or float64; any
            strides with a contiguous head_dim. H is a multiple of Hkv (grouped-query attention).
        v_cache: as `k_cache`.
        block_table: [B, max_blocks] int32, the blocks of each entry in order; entries may share
            blocks, and blocks that no query sees are not looked at.
        context_lens: [N] int32, at most max_blocks * block_size; must not fall inside an entry.
        cu_seqlens_q: [B + 1] int32; entry b has queries `cu[b] .. cu[b + 1] - 1`, perhaps none.
        context_starts: [N] int32, at most `context_lens`, must not fall inside an entry: keys
            before it are hidden (sliding window).
        scale: factor of the scores, by default head_dim**-0.5.

    Returns:
        out [N, H, head_dim] and softmax_lse [H, N] float32 (float64 for float64). A query that sees
        no key gives 0 and -inf. The same for any number of threads and, on the CPU, whatever other
        entries are in the call.

    Raises:
        RuntimeError: wrong rank, size, dtype, device or strides; where a gradient would be needed:
            there is none (`depth_attention` over the rows of `kv_gather` has one). On the CPU also
            wrong values of the four index operands (undefined on CUDA).

    Reference: MoR paper, section 2.2.2 (recursion-wise caching and recursive KV sharing).

    Example:
        >>> q, cache = torch.zeros(2, 1, 1), torch.arange(6.0).view(3, 2, 1, 1)
        >>> table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)  # keys 4, 5, 0, 1 and 2, 3
        >>> lens, cu = torch.tensor([3, 1], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
        >>> paged_depth_attention(q, cache, cache, table, lens, cu)[0].flatten()
        tensor([3., 2.])
    """
    try:
        refuse_gradients(
            "paged_depth_attention", "torch.no_grad(), or depth_attention",
            q=q, k_cache=k_cache, v_cache=v_cache,
        )  # fmt: skip
        if scale is None:
            # A wrong rank is refused below.
            scale = max(q.shape[-1], 1) ** -0.5 if q.dim() == 3 else 1.0
        return _operator(
            q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, context_starts, scale
        )
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            paged_depth_attention,
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=block_table,
            context_lens=context_lens,
            cu_seqlens_q=cu_seqlens_q,
            context_starts=context_starts,
        )
        raise


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor,
    cu_seqlens_q: Tensor, *, context_starts: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, query by query, softmax in float32 as Transformers does it."""
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k_cache.shape[2]
    block_size, factor = k_cache.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=total)
    cu = cu_seqlens_q.tolist()
    for b, blocks in enumerate(block_table.long()):
        for i in range(cu[b], cu[b + 1]):
            first = 0 if context_starts is None else int(context_starts[i])
            at = torch.arange(first, int(context_lens[i]), device=q.device)
            if len(at) == 0:
                continue
            keys, values = (
                cache[blocks[at // block_size], at % block_size].repeat_interleave(group, dim=1)
                for cache in (k_cache, v_cache)
            )
            scores = (torch.einsum("hd,jhd->hj", q[i], keys) * factor).to(total)
            out[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1).to(q.dtype), values)
            lse[:, i] = scores.logsumexp(-1)
    return out, lse


@torch.library.register_fake("mor::paged_depth_attention")
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor,
    cu_seqlens_q: Tensor, context_starts: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "paged_depth_attention"
    check_head_dim(op, k_cache, 4)
    check_operands(op, k_cache, v_cache, q, block_table, context_lens, cu_seqlens_q, context_starts)
    check_kv_cache(k_cache, v_cache, op)
    kv_heads = k_cache.shape[2]

    multiple = kv_heads > 0 and q.shape[1] % kv_heads == 0
    text = f"the {q.shape[1]} heads of q to be a multiple of those of k_cache"
    expect(op, multiple, text, kv_heads)
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=total)
