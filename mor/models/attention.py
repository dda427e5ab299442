"""Transformers' attention interface, served by depth_attention under the name "mor"."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from mor.models.cache import RecursionCacheLayer
from mor.modules.packing import Packing
from mor.ops import depth_attention

__all__ = ["AttentionContext", "mor_attention"]


@dataclass(frozen=True)
class AttentionContext:
    """What one call of a decoder layer attends over.

    Attributes:
        packing: the active tokens.
        cache: where their keys and values are kept, if there is a cache.
        longest: most active tokens any sequence can have in this call.
    """

    packing: Packing
    cache: RecursionCacheLayer | None = None
    longest: int = 0


def mor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    mor_context: AttentionContext,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens; query [1, H, K, head_dim], key and value [1, Hkv, K, head_dim].

    Returns:
        [1, K, H, head_dim] and None (there are no attention weights).

    Raises:
        ValueError: attention dropout, sliding windows or soft-capping, which depth_attention lacks.
    """
    if dropout > 0.0:
        raise ValueError(f"mor attention: attention_dropout is not supported, got {dropout}")
    for name in ("sliding_window", "softcap"):
        if kwargs.get(name) is not None:
            raise ValueError(f"mor attention: {name} is not supported, got {kwargs[name]}")
    packing = mor_context.packing
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k_positions, cu_seqlens_k = packing.positions, packing.cu_seqlens
    if mor_context.cache is not None:
        k, v, k_positions, cu_seqlens_k = mor_context.cache.append(
            k, v, packing, mor_context.longest
        )
    out, _ = depth_attention(
        q,
        k,
        v,
        packing.positions,
        k_positions,
        packing.cu_seqlens,
        cu_seqlens_k,
        scale=scaling,
    )
    return out.unsqueeze(0), None


AttentionInterface.register("mor", mor_attention)
