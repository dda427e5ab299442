"""A decoder layer that some of the vision tokens take, and all of the text."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from mor.models.attention import AttentionContext
from mor.models.cache import Placement, recursion_layers
from mor.models.swap.routed_layers import record_states
from mor.modules.packing import Packing
from mor.modules.recursion import LastRouting
from mor.modules.routers import Float32Linear
from mor.ops.gather_tokens import gather_tokens
from mor.systems.vision_tokens import VisionCall, VisionTokens

__all__ = ["VisionLayer"]


class VisionLayer(GradientCheckpointingLayer):
    """Takes the place of a decoder layer. Subclasses say which tokens it keeps, and their weights.

    Kept tokens attend to each other at their own positions, and the layer's cache holds them alone.

    Args:
        layer: a pre-norm decoder layer of Transformers with `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp`, as Llama's, whose attention is "mor".
        router: scores [N, D] as [N, 1].
        slot: index of the layer in the model's cache.
        num_layers: of the model.
        ratio: share of the vision tokens, in (0, 1].

    Attributes:
        token_depths: [B, S] 1 where a token took the layer in this thread's last call; 0 for
            skipped tokens and pads.
    """

    #: The function that put the layer in; begins the errors.
    where: str

    def __init__(
        self, layer: nn.Module, router: Float32Linear, slot: int, num_layers: int, ratio: float
    ) -> None:
        super().__init__()
        self.layer, self.slot, self.num_layers, self.ratio = layer, slot, num_layers, ratio
        self.router = router
        self._last = LastRouting()

    @property
    def token_depths(self) -> Tensor | None:
        """[B, S] int64: 1 where a token took the layer in this thread's last call."""
        return self._last.token_depths

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        mor_call: VisionCall | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer, as a decoder layer is called: [B, S, D] to [B, S, D].

        Args:
            hidden_states: [B, S, D].
            attention_mask: what the model made of its mask; not used, see `VisionCall`.
            position_ids: [B or 1, S].
            past_key_values: the model's cache.
            use_cache: not used.
            position_embeddings: cos and sin [B or 1, S, head_dim].
            mor_call: what this call of the model knows.
            **kwargs: passed to the attention.

        Raises:
            ValueError: the decoder was called without the model around it.
        """
        if mor_call is None:
            raise ValueError(
                f"{self.where}: expected a call of the model itself, which knows the vision "
                "tokens; got one of its decoder"
            )
        assert position_embeddings is not None, "expected a model with rotary positions"
        cache = None
        if past_key_values is not None:
            (cache,) = recursion_layers(past_key_values, [self.slot], self.num_layers, self.where)
        tokens = mor_call.find(position_ids, cache)
        batch = tokens.batch
        size = hidden_states.shape[0]
        cos, sin = (batch.pack(x.expand(size, *x.shape[1:])) for x in position_embeddings)
        context = AttentionContext(batch.packing, cache, Placement(batch.shape[1]))
        x = batch.pack(hidden_states)
        out, kept = self.run(x, tokens, (cos, sin), context, **kwargs)
        depths = batch.packing.positions.new_zeros(x.shape[0]).index_fill(0, kept, 1)
        self._last.token_depths = batch.unpack_masked(depths, 0)
        if cache is not None:
            cache.advance(batch.last_positions())
        result = batch.unpack(out)
        captured = _active_collector.get()
        if captured is not None and "hidden_states" in captured:
            record_states(captured, hidden_states, [result])
        return result

    def run(
        self,
        x: Tensor,
        tokens: VisionTokens,
        angles: tuple[Tensor, Tensor],
        context: AttentionContext,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The layer on packed rows. The host reads nothing.

        Args:
            x: [N, D].
            tokens: which of them are vision tokens.
            angles: cos and sin [N, head_dim].
            context: of all rows; their cache.
            **kwargs: passed to the attention.

        Returns:
            [N, D], and the rows [K] that took the layer.
        """
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """[N] of the router, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x).squeeze(1)

    @staticmethod
    def take(
        kept: Tensor, packing: Packing, tokens: VisionTokens, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        """Rows `kept` of each tensor: all of them where `tokens.keep` kept everything."""
        if packing is tokens.batch.packing:
            return parts
        return tuple(gather_tokens(part, kept) for part in parts)

    def attend(
        self,
        rows: Tensor,
        angles: tuple[Tensor, Tensor],
        packing: Packing,
        context: AttentionContext,
        **kwargs: Any,
    ) -> Tensor:
        """Attention's addition to the kept rows [K, D]: [K, D]."""
        layer: Any = self.layer
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(rows).unsqueeze(0),
            position_embeddings=(angles[0].unsqueeze(0), angles[1].unsqueeze(0)),
            attention_mask=None,
            mor_context=AttentionContext(packing, context.cache, context.placement),
            **kwargs,
        )
        out: Tensor = attended.squeeze(0)
        return out

    def feed_forward(self, a: Tensor) -> Tensor:
        """The MLP's addition to the kept rows [K, D] behind attention: [K, D]."""
        layer: Any = self.layer
        out: Tensor = layer.mlp(layer.post_attention_layernorm(a))
        return out
