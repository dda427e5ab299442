"""One p-MoD layer: some of the vision tokens of a prompt take it, all of the text does."""

from typing import Any

import torch
from torch import Tensor, nn

from mor.models.attention import AttentionContext
from mor.modules.routers import Float32Linear
from mor.ops.scatter_tokens import scatter_tokens
from mor.systems.vision_layer import VisionLayer
from mor.systems.vision_tokens import VisionTokens

__all__ = ["PMoD"]


class PMoD(VisionLayer):
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

    where = "apply_pmod"

    def __init__(
        self,
        layer: nn.Module,
        hidden_size: int,
        slot: int,
        num_layers: int,
        ratio: float,
        alpha: float = 0.2,
    ) -> None:
        router = Float32Linear(hidden_size, 1)
        nn.init.zeros_(router.weight)
        nn.init.zeros_(router.bias)
        super().__init__(layer, router, slot, num_layers, ratio)
        self.alpha = alpha

    def run(
        self,
        x: Tensor,
        tokens: VisionTokens,
        angles: tuple[Tensor, Tensor],
        context: AttentionContext,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `VisionLayer.run`."""
        z = self.logits(x)
        w = 1 + self.alpha * torch.where(tokens.is_vision, z, 0).tanh()  # 1 for text
        kept, packing = tokens.keep(z.detach(), self.ratio)
        if kept.shape[0] == 0:  # nothing but vision tokens, all skipped
            return scatter_tokens(x, x[:0], kept, base_scale=w), kept
        rows, cos, sin, gate = self.take(kept, packing, tokens, x, *angles, w)
        a = rows + self.attend(rows, (cos, sin), packing, context, **kwargs)
        update = self.feed_forward(a).to(a.dtype)
        local = torch.arange(a.shape[0], device=a.device)
        y = scatter_tokens(a, update, local, gate).to(x.dtype)
        if packing is tokens.batch.packing:  # everything was kept
            return y, kept
        return scatter_tokens(x, y, kept, base_scale=w.index_fill(0, kept, 0)), kept
