"""One VideoLLM-MoD layer: some of the vision tokens of each frame take it, all of the text does."""

from typing import Any

import torch
from torch import Tensor, nn

from mor.models.attention import AttentionContext
from mor.modules.routers import Float32Linear
from mor.ops.scatter_tokens import scatter_tokens
from mor.systems.vision_layer import VisionLayer
from mor.systems.vision_tokens import VisionTokens

__all__ = ["VideoMoD"]

_STD = 0.02


class VideoMoD(VisionLayer):
    """A decoder layer that a share of the vision tokens of each frame takes, in place of the layer.

    With mu the router's logit of a token (the paper's LayerExpert) and f what the layer adds to its
    residual stream, computed of the kept tokens alone:

        kept vision token:     x + mu * f(x)
        skipped vision token:  x
        text token:            x + f(x)

    Of the n vision tokens of a frame the trunc(ratio * n), at least one, with the largest mu are
    kept, ranked in float32, ties by position; text is never skipped. A frame is complete before
    anything behind it, so a stream of frames keeps the same tokens as the whole clip. Kept tokens
    attend to each other at their own positions, and the layer's cache holds them alone.

    Args:
        layer: a pre-norm decoder layer of Transformers with `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp`, as Llama's, whose attention is "mor".
        hidden_size: D.
        slot: index of the layer in the model's cache.
        num_layers: of the model.
        ratio: share of the vision tokens of each frame, in (0, 1].

    Attributes:
        token_depths: [B, S] 1 where a token took the layer in this thread's last call; 0 for
            skipped tokens and pads.

    Reference: VideoLLM-MoD (arXiv 2408.16730). Its authors published no code; that mu is the logit
        itself, as in Mixture-of-Depths, is our reading.
    """

    where = "apply_video_mod"

    def __init__(
        self, layer: nn.Module, hidden_size: int, slot: int, num_layers: int, ratio: float = 0.2
    ) -> None:
        router = Float32Linear(hidden_size, 1, bias=False)
        nn.init.normal_(router.weight, std=_STD)
        super().__init__(layer, router, slot, num_layers, ratio)

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
        kept, packing = tokens.keep(z.detach(), self.ratio, least=1)
        mu = torch.where(tokens.is_vision, z, 1)
        rows, cos, sin, gate = self.take(kept, packing, tokens, x, *angles, mu)
        attended = self.attend(rows, (cos, sin), packing, context, **kwargs)
        update = attended + self.feed_forward(rows + attended)
        return scatter_tokens(x, update.to(x.dtype), kept, gate), kept
