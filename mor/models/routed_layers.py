"""Decoder layers of a Transformers model as one routed block: what `mor.swap` puts in."""

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mor.models.attention import AttentionContext
from mor.models.cache import RecursionCacheLayer
from mor.modules.expert_choice import ExpertChoice
from mor.modules.packing import Packing, pack
from mor.modules.recursion import RecursionOutput
from mor.modules.token_choice import TokenChoice

__all__ = ["RoutedLayers"]


class RoutedLayers(nn.Module):
    """Decoder layers of a Transformers model, run up to R times on the tokens a router keeps.

    It stands where one decoder layer stood and takes what that takes. Inside, tokens are packed and
    attention is `depth_attention`; the layers' entries of the model's cache become recursion-wise
    ones when a cache is first used.

    Args:
        layers: the layers of the shared block.
        config: the dense model's configuration.
        slots: index in the model's cache of each layer in each recursion, R times as many as
            layers; those past the model's own are added to the cache.
        num_recursions: R.
        router: "expert" or "token".
        **options: of `ExpertChoice` or `TokenChoice`.

    Attributes:
        routing: the last call's `RecursionOutput`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        config: Any,
        slots: Sequence[int],
        num_recursions: int,
        router: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.slots, self.num_dense_layers = slots, config.num_hidden_layers
        kind = {"expert": ExpertChoice, "token": TokenChoice}.get(router)
        if kind is None:
            raise ValueError(f"swap: expected router to be expert or token, got {router!r}")
        known = [*signature(kind).parameters][2:]  # after hidden_size and num_recursions
        if unknown := sorted({*options} - {*known}):
            raise ValueError(f"swap: {kind.__name__} has no option {unknown}, only {known}")
        self.recursion: ExpertChoice | TokenChoice = kind(
            config.hidden_size, num_recursions, **options
        )
        attention = copy.deepcopy(config)
        attention._attn_implementation = "mor"
        for layer in self.layers:
            layer.get_submodule("self_attn").config = attention
        self.routing: RecursionOutput | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As a decoder layer: [B, S, D] to [B, S, D].

        Args:
            hidden_states: [B, S, D].
            attention_mask: what the model makes for its attention: None (causal), [B, S], or
                [B, 1, S, past + S].
            position_ids: [B or 1, S].
            past_key_values: the model's cache.
            use_cache: not used.
            position_embeddings: cos and sin [B or 1, S, head_dim].
            **kwargs: passed to the layers.
        """
        assert position_embeddings is not None, "expected a model with rotary positions"
        if "cache" in kwargs:  # its keys are read and written past `past_key_values`
            raise NotImplementedError(
                "swap: generate_batch has no place for tokens that leave early; use generate()"
            )
        batch_size, length, _ = hidden_states.shape
        caches = self._caches(past_key_values)
        batch = pack(
            (batch_size, length),
            hidden_states.device,
            _token_mask(attention_mask, length),
            position_ids,
            documents=caches[0] is None or caches[0].num_columns == 0,
        )
        if past_key_values is not None and batch.packing.num_sequences != batch_size:
            # The dense layers would not separate them either: Transformers does so without a cache.
            raise ValueError("swap: documents packed in a row need use_cache=False")
        cos, sin = (batch.pack(x.expand(batch_size, *x.shape[1:])) for x in position_embeddings)
        depth = len(self.layers)

        def block(x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
            empty = x.shape[0] == 0
            turn = cos[rows].unsqueeze(0), sin[rows].unsqueeze(0)
            if empty:  # every process runs every layer; see MoRModel
                x = x.new_zeros(1, x.shape[1]) + 0 * x.sum()
                packing = Packing.uniform(1, 1, packing.positions.new_zeros(1))
                turn = cos[:1].unsqueeze(0), sin[:1].unsqueeze(0)
            for index, layer in enumerate(self.layers):
                cache = None if empty else caches[step * depth + index]
                out = layer(
                    x.unsqueeze(0),
                    position_embeddings=turn,
                    mor_context=AttentionContext(packing, cache, length),
                    **kwargs,
                )
                x = (out[0] if isinstance(out, tuple) else out).squeeze(0)
            return x[:0] if empty else x

        self.routing = self.recursion(batch.pack(hidden_states), batch.packing, block)
        for cache in caches:
            if cache is not None:
                cache.advance(length, batch.last_positions())
        return batch.unpack(self.routing.hidden)

    def _caches(self, cache: Cache | None) -> list[RecursionCacheLayer | None]:
        if cache is None:
            return [None] * len(self.slots)
        if len(cache.layers) < self.num_dense_layers:
            raise ValueError(
                "swap: expected past_key_values = DynamicCache(config=model.config), got a cache "
                f"of {len(cache.layers)} layers"
            )
        while len(cache.layers) <= max(self.slots):
            cache.layers.append(RecursionCacheLayer())
        for slot in self.slots:
            if not isinstance(cache.layers[slot], RecursionCacheLayer):
                cache.layers[slot] = RecursionCacheLayer()
        return [cache.layers[slot] for slot in self.slots]


def _token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B, S] mask of tokens from whatever the model made: who sees itself is no pad."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:]
    own = attention_mask[:, 0, :, -length:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own >= 0
