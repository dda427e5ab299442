"""Outputs of the MoR models."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from mor.modules.recursion import RecursionOutput

__all__ = ["MoRCausalLMOutput", "MoRModelOutput"]


@dataclass
class MoRModelOutput(ModelOutput):
    """Output of `MoRModel`.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm; a pad shows the token before it.
        past_key_values: the cache, if one is used.
        hidden_states: L + 1 states [B, S, D], embeddings first, on request. Inside the recursions a
            token that is not active keeps its state.
        attentions: None; depth_attention keeps no weights.
        token_depths: [B, S] int64 recursion steps each token took; 0 for pads.
        aux_loss, z_loss, balancing_loss: unscaled router losses; None where not used.
        router_loss: their weighted sum, what the loss contains besides the language-model loss.
        routing: the recursion in packed rows, for inspection.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    token_depths: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None
    router_loss: Tensor | None = None
    routing: RecursionOutput | None = None


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """Output of `MoRForCausalLM`; the fields it shares with `MoRModelOutput` mean the same.

    Attributes:
        loss: lm_loss + router_loss (weighted by this batch's share of `num_items_in_batch`, so that
            gradient accumulation and several processes do not change the weight).
        logits: [B, S, V].
        lm_loss: next-token cross-entropy.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    token_depths: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None
    router_loss: Tensor | None = None
    routing: RecursionOutput | None = None

    @classmethod
    def of(
        cls, base: MoRModelOutput, logits: Tensor, loss: Tensor | None, lm_loss: Tensor | None
    ) -> "MoRCausalLMOutput":
        """The output of a language model whose decoder gave `base`."""
        shared = {name: base[name] for name in base if name != "last_hidden_state"}
        return cls(loss=loss, logits=logits, lm_loss=lm_loss, **shared)
