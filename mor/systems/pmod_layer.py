"""One p-MoD layer: some of the vision tokens of a prompt take it, all of the text does."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from mor.models.attention import AttentionContext
from mor.models.cache import Placement, RecursionCacheLayer, recursion_layers
from mor.models.swap.routed_layers import pack_call, record_states
from mor.modules.packing import PackedBatch, Packing
from mor.modules.recursion import LastRouting
from mor.modules.routers import Float32Linear
from mor.ops.gather_tokens import gather_tokens
from mor.ops.route_topk import route_topk
from mor.ops.scatter_tokens import scatter_tokens

__all__ = ["PMoD", "VisionCall", "VisionTokens"]


@dataclass(frozen=True)
class VisionTokens:
    """The packed tokens of a batch, and which of them are vision tokens.

    Attributes:
        batch: how the batch was packed.
        is_vision: [N] bool.
        counts: vision tokens of each sequence, on the host.
    """

    batch: PackedBatch
    is_vision: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch, vision: Tensor) -> "VisionTokens":
        """Reads the counts of vision [B, S] bool from the device, once for all layers."""
        is_vision = batch.pack(vision)
        ends = torch.nn.functional.pad(is_vision.cumsum(0), (1, 0))
        counts = ends[batch.packing.cu_seqlens.long()].diff().tolist()
        return cls(batch, is_vision, tuple(counts))

    def k(self, ratio: float) -> list[int]:
        """trunc(n * ratio) of the n vision tokens of each sequence."""
        return [int(count * ratio) for count in self.counts]


@dataclass(eq=False)
class VisionCall:
    """One forward call of a p-MoD model.

    Attributes:
        vision: [B, S] bool, the vision tokens.
        attention_mask: [B, S] or [B, past + S] as the caller gave it.
        described: the caller gave position_ids.
        tokens: found by the first p-MoD layer for all.
    """

    vision: Tensor
    attention_mask: Tensor | None = None
    described: bool = False
    tokens: VisionTokens | None = field(default=None)

    def find(self, position_ids: Tensor | None, cache: RecursionCacheLayer | None) -> VisionTokens:
        """The tokens of this call."""
        if self.tokens is None:
            batch = pack_call(self.vision, self.attention_mask, position_ids, self.described, cache)
            if batch.has_documents:
                raise ValueError(
                    "apply_pmod: position_ids: expected one document in each row, got positions "
                    "that restart"
                )
            self.tokens = VisionTokens.of(batch, self.vision)
        return self.tokens


class PMoD(GradientCheckpointingLayer):
    """A decoder layer that a share of the vision tokens takes, in place of the layer.

    With z the router's logit of a token and `w = 1 + alpha * tanh(z)` (TanhNorm), a the residual
    stream behind the layer's attention::

        kept vision token:     a + w * MLP(a)
        skipped vision token:  w * x
        text token:            a + MLP(a)

    Of the n vision tokens of a sequence the trunc(ratio * n) with the largest z are kept, ranked in
    float32 on z itself (w takes only 78 values in bfloat16), ties by position; text is never
    skipped. Kept tokens attend to each other at their own positions, and the layer's cache holds
    them alone. The router begins at zero: w = 1.

    Args:
        layer: a pre-norm decoder layer of Transformers with `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp`, as Llama's, whose attention is "mor".
        hidden_size: the width D.
        slot: index of the layer in the model's cache.
        num_layers: of the model.
        ratio: share of the vision tokens, in (0, 1].
        alpha: the published 0.2.

    Attributes:
        token_depths: [B, S] 1 where a token took the layer in this thread's last call; 0 for
            skipped tokens and pads.

    Reference: p-MoD (arXiv 2412.04449), with STRing as in the authors' code.
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden_size: int,
        slot: int,
        num_layers: int,
        ratio: float,
        alpha: float = 0.2,
    ) -> None:
        super().__init__()
        self.layer, self.slot, self.num_layers = layer, slot, num_layers
        self.ratio, self.alpha = ratio, alpha
        self.router = Float32Linear(hidden_size, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
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
        """As a decoder layer: [B, S, D] to [B, S, D].

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
                "apply_pmod: expected a call of the model itself, which knows the vision tokens; "
                "got one of its decoder"
            )
        assert position_embeddings is not None, "expected a model with rotary positions"
        cache = None
        if past_key_values is not None:
            where = "apply_pmod"
            (cache,) = recursion_layers(past_key_values, [self.slot], self.num_layers, where)
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
        with torch.autocast(x.device.type, enabled=False):
            z = self.router(x).squeeze(1)
        w = 1 + self.alpha * torch.where(tokens.is_vision, z, 0).tanh()  # 1 for text
        kept, packing = self._keep(z.detach(), tokens)
        if kept.shape[0] == 0:  # nothing but vision tokens, all skipped
            return scatter_tokens(x, x[:0], kept, base_scale=w), kept
        everything = packing is tokens.batch.packing
        if everything:
            rows, cos, sin, gate = x, *angles, w
        else:
            rows, cos, sin, gate = (gather_tokens(part, kept) for part in (x, *angles, w))
        layer: Any = self.layer
        context = AttentionContext(packing, context.cache, context.placement)
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(rows).unsqueeze(0),
            position_embeddings=(cos.unsqueeze(0), sin.unsqueeze(0)),
            attention_mask=None,
            mor_context=context,
            **kwargs,
        )
        a = rows + attended.squeeze(0)
        update = layer.mlp(layer.post_attention_layernorm(a)).to(a.dtype)
        local = torch.arange(a.shape[0], device=a.device)
        y = scatter_tokens(a, update, local, gate).to(x.dtype)
        if everything:
            return y, kept
        return scatter_tokens(x, y, kept, base_scale=w.index_fill(0, kept, 0)), kept

    def _keep(self, z: Tensor, tokens: VisionTokens) -> tuple[Tensor, Packing]:
        """Text and the best vision tokens, ascending, and their packing."""
        packing, k = tokens.batch.packing, tokens.k(self.ratio)
        if k == [*tokens.counts]:
            return torch.arange(z.shape[0], device=z.device), packing
        assert packing.lengths is not None
        lengths = [
            length - count + best
            for length, count, best in zip(packing.lengths, tokens.counts, k, strict=True)
        ]
        kept = route_topk(
            z,
            torch.tensor(k, dtype=torch.int64).to(z.device),
            packing.cu_seqlens,
            num_rows=sum(lengths),
            candidates=tokens.is_vision,
            protected_rows=~tokens.is_vision,
        )
        return kept, packing.select(kept, lengths=lengths)
