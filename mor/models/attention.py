"""Transformers' attention interface, served by depth_attention under the name "mor"."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from mor.models.cache import Placement, RecursionCacheLayer
from mor.models.derived_class import Derived, derived_class
from mor.modules.packing import Packing
from mor.ops.depth_attention import depth_attention

__all__ = [
    "AttentionContext",
    "SharedKV",
    "check_attention",
    "layer_types_at",
    "mor_attention",
    "skip_reused_projections",
    "windows",
]

_FULL, _SLIDING = "full_attention", "sliding_attention"

KeyView = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys, values [Nk, Hkv, head_dim], positions [Nk] and cu_seqlens [B + 1]."""


class SharedKV:
    """Keys and values of a layer's first use, for its later uses (recursive KV sharing).

    Attributes:
        keys, values: [N, Hkv, head_dim] of this call's tokens.
        view: what the first use attended over: those, or the whole cache.
        packing: all tokens of this call.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.view: KeyView | None = None


@dataclass(frozen=True)
class AttentionContext:
    """What one call of a decoder layer attends over.

    Attributes:
        packing: the active tokens, which are the queries.
        cache: where their keys and values are kept, if there is a cache.
        placement: where they go in it, found once for all layers that the tokens run together.
        shared: with KV sharing, where the first use of this layer leaves its keys and values.
        reuses_kv: a later use, which computes no keys and values of its own.
        rows: a later use that overwrites the shared keys of its active tokens (hybrid): their rows
            among all tokens of this call.
        use: how many earlier depths used the same layer.
    """

    packing: Packing
    cache: RecursionCacheLayer | None = None
    placement: Placement | None = None
    shared: SharedKV | None = None
    reuses_kv: bool = False
    rows: Tensor | None = None
    use: int = 0

    def keys_for(self, keys: Tensor, values: Tensor) -> KeyView:
        """Everything the queries may see, given the keys and values just computed."""
        if self.shared is None:
            return self._append(keys, values, self.packing)
        if self.reuses_kv:
            assert self.shared.view is not None, "the first use of a layer comes first"
            return self.shared.view
        if self.rows is not None:
            assert self.shared.keys is not None and self.shared.values is not None
            count = self.rows.shape[0]  # without torch.compile's dummy row
            keys = self.shared.keys.index_copy(0, self.rows, keys[:count])
            values = self.shared.values.index_copy(0, self.rows, values[:count])
            return self._append(keys, values, self.shared.packing)
        self.shared.keys, self.shared.values = keys, values
        self.shared.view = self._append(keys, values, self.packing)
        return self.shared.view

    def _append(self, keys: Tensor, values: Tensor, packing: Packing) -> KeyView:
        if self.cache is None:
            return keys, values, packing.positions, packing.cu_seqlens
        assert self.placement is not None
        return self.cache.append(keys, values, packing, self.placement)


def check_attention(config: Any, option: str) -> None:
    """Refuses what depth_attention lacks, before any tensor exists.

    Raises:
        ValueError: attention dropout, soft-capping, attention to later tokens, or layers of a kind
            other than full_attention and sliding_attention.
    """
    for name in (
        "attention_dropout",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if getattr(config, name, None):
            raise ValueError(f"{option}: {name} is not supported, got {getattr(config, name)}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if kinds:
        raise ValueError(
            f"{option}: expected layer_types of {_FULL} and {_SLIDING}, got {sorted(kinds)}"
        )


def layer_types_at(config: Any, depths: int, option: str) -> list[str] | None:
    """Attention type of each of `depths` layers; None for architectures without `layer_types`.

    Raises:
        ValueError: layers of several types, but not as many as depths.
    """
    types = getattr(config, "layer_types", None)
    if not types:
        return None
    if len(set(types)) == 1:
        return [types[0]] * depths
    if len(types) != depths:
        raise ValueError(
            f"{option}: expected layer_types of {depths} layers, got {len(types)}: set it to the "
            "types of the unrolled layers"
        )
    return list(types)


def windows(config: Any) -> list[int | None]:
    """Window of each layer of a dense configuration; None where a token sees all before it."""
    window = getattr(config, "sliding_window", None)
    types = layer_types_at(config, config.num_hidden_layers, type(config).__name__)
    return [
        window if types is None or types[depth] == _SLIDING else None
        for depth in range(config.num_hidden_layers)
    ]


def mor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    mor_context: AttentionContext,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens; query [1, H, K, head_dim], key and value [1, Hkv, K, head_dim].

    Returns:
        [1, K, H, head_dim] and None (there are no attention weights).

    What depth_attention lacks (dropout, soft-capping) `check_attention` refuses when a model is
    made.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # Under autocast the rotary embedding leaves queries and keys in float32.
    q, k = q.to(v.dtype), k.to(v.dtype)
    k, v, k_positions, cu_seqlens_k = mor_context.keys_for(k, v)
    out, _ = depth_attention(
        q,
        k,
        v,
        mor_context.packing.positions,
        k_positions,
        mor_context.packing.cu_seqlens,
        cu_seqlens_k,
        scale=scaling,
        window=sliding_window,
    )
    return out.unsqueeze(0), None


class _WithoutProjections:
    """An attention module as its own forward sees it in a call that reuses keys and values.

    Everything is that of the module, but k_proj and v_proj, which give one head of zeros, unread.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def k_proj(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], self.attention.head_dim)

    v_proj = k_proj


class _ReusesKeys(Derived):
    """What `skip_reused_projections` puts before the class of an attention module."""

    def forward(self, *args: Any, mor_context: AttentionContext, **kwargs: Any) -> Any:
        attention = _WithoutProjections(self) if mor_context.reuses_kv else self
        return self.dense_class.forward(attention, *args, mor_context=mor_context, **kwargs)


def skip_reused_projections(attention: nn.Module) -> None:
    """Makes a Transformers attention module skip k_proj and v_proj in calls that reuse keys.

    Nothing of the module changes during a call, so threads can share it and any error or interrupt
    leaves it whole; and whatever the projections have become meanwhile (LoRA) is skipped as well.
    """
    attention.__class__ = derived_class(_ReusesKeys, type(attention))


AttentionInterface.register("mor", mor_attention)
