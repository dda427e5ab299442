"""mor.swap: replaces a range of decoder layers of a loaded model by one routed, shared block."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from mor.models.attention import AttentionContext, check_attention
from mor.models.cache import RecursionCacheLayer
from mor.models.modeling_mor import batch_share
from mor.modules.expert_choice import ExpertChoice
from mor.modules.packing import Packing, pack
from mor.modules.recursion import RecursionOutput
from mor.modules.routers import RouterScore
from mor.modules.token_choice import TokenChoice

__all__ = ["RoutedLayers", "load_swapped", "swap"]

_COEFFICIENTS = {"aux_loss": 0.001, "balancing_loss": 0.1, "z_loss": 1e-5}


class RoutedLayers(nn.Module):
    """Decoder layers of a Transformers model, run up to R times on the tokens a router keeps.

    It stands where one decoder layer stood and takes what that takes. Inside, tokens are packed and
    attention is `depth_attention`; the layers' entries of the model's cache become recursion-wise
    ones when a cache is first used.

    Args:
        layers: the layers of the shared block.
        config: the dense model's configuration.
        first: unrolled depth of the first of them.
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
        first: int,
        num_recursions: int,
        router: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.first, self.num_recursions = first, num_recursions
        kind = {"expert": ExpertChoice, "token": TokenChoice}.get(router)
        if kind is None:
            raise ValueError(f"swap: expected router to be expert or token, got {router!r}")
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
        assert position_embeddings is not None, (
            "RoutedLayers stands in models with rotary positions"
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
        count = len(self.layers) * self.num_recursions
        if cache is None:
            return [None] * count
        if len(cache.layers) < self.first + count:
            raise ValueError(
                "swap: expected past_key_values = DynamicCache(config=model.config), got a cache "
                f"of {len(cache.layers)} layers"
            )
        for depth in range(self.first, self.first + count):
            if not isinstance(cache.layers[depth], RecursionCacheLayer):
                cache.layers[depth] = RecursionCacheLayer()
        return cache.layers[self.first : self.first + count]


def _token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B, S] mask of tokens from whatever the model made: who sees itself is no pad."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:]
    own = attention_mask[:, 0, :, -length:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own >= 0


def swap(
    model: PreTrainedModel,
    layers: range | tuple[int, int],
    num_recursions: int,
    router: str = "expert",
    *,
    loss_coefficients: dict[str, float] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replaces decoder layers of a loaded model, in place, by a Mixture-of-Recursions block.

    Of the replaced range, as deep as before when unrolled, the first (last - first) / R layers are
    kept and used up to R times.

    Args:
        model: a causal language model of the Llama family (`model.model.layers`).
        layers: range, or (first, one after the last).
        num_recursions: R; divides the number of layers.
        router: "expert" or "token".
        loss_coefficients: weights of the router's losses in `output.loss`; default 0.001 for
            "aux_loss", 0.1 for "balancing_loss".
        **options: of `mor.modules.ExpertChoice` or `TokenChoice`; `score` also as a dict of
            `RouterScore`'s fields.

    Returns:
        The same model. It trains (the router's losses are part of `output.loss`), generates, and
        saves with `save_pretrained`; `mor.load_swapped` loads it.

    Raises:
        ValueError: layers outside the model, a count that R does not divide, a model without the
            expected structure.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...     num_hidden_layers=8, vocab_size=64)
        >>> model = swap(LlamaForCausalLM(config), (1, 7), num_recursions=3)
        >>> len(model.model.layers)
        3
    """
    span = layers if isinstance(layers, range) else range(*layers)
    stack = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise ValueError(f"swap: expected a model with model.layers, got {type(model).__name__}")
    if span.step != 1 or not 0 <= span.start < span.stop <= len(stack):
        raise ValueError(f"swap: expected layers within 0..{len(stack)}, got {span}")
    if num_recursions < 1 or len(span) % num_recursions:
        raise ValueError(
            f"swap: {num_recursions} recursions must divide the {len(span)} layers of {span}"
        )
    if any(isinstance(layer, RoutedLayers) for layer in stack):
        raise ValueError("swap: the model has routed layers already")
    coefficients = {**_COEFFICIENTS, **(loss_coefficients or {})}
    if len(coefficients) > len(_COEFFICIENTS):
        raise ValueError(
            f"swap: loss_coefficients: expected names among {list(_COEFFICIENTS)}, got "
            f"{list(loss_coefficients or {})}"
        )
    check_attention(model.config, "swap")
    kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
    if len(kinds) > 1:  # the model would hand the layers behind the block another kind's masks
        raise ValueError(f"swap: expected layers of one attention type, got {kinds}; see MoRConfig")
    score = options.get("score")
    if isinstance(score, RouterScore):
        options["score"] = asdict(score)
    kept = list(stack[span.start : span.start + len(span) // num_recursions])
    made = {**options, **({"score": RouterScore(**options["score"])} if score else {})}
    routed = RoutedLayers(kept, model.config, span.start, num_recursions, router, **made)
    routed.to(device=model.device, dtype=model.dtype)
    model.model.layers = nn.ModuleList([*stack[: span.start], routed, *stack[span.stop :]])
    model.config.mor_swap = {
        "layers": [span.start, span.stop],
        "num_recursions": num_recursions,
        "router": router,
        "loss_coefficients": loss_coefficients,
        **options,
    }

    def add_losses(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if loss is None or routed.routing is None:
            return output
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        share = 1.0 if labels is None else batch_share(labels, items)
        for name, coefficient in coefficients.items():
            part = getattr(routed.routing, name)
            if part is not None:
                loss = loss + coefficient * share * part
        output.loss = loss
        return output

    model.register_forward_hook(add_losses, with_kwargs=True)
    return model


def load_swapped(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a model that was swapped and saved with `save_pretrained`.

    Args:
        path: the directory.
        **kwargs: passed to `AutoModelForCausalLM.from_config` (dtype, ...).

    Raises:
        ValueError: a directory of a model that was not swapped.
    """
    config = AutoConfig.from_pretrained(path)
    options = dict(getattr(config, "mor_swap", None) or {})
    if not options:
        raise ValueError(f"load_swapped: {path} holds no swapped model (no mor_swap in its config)")
    layers = options.pop("layers")
    model = swap(AutoModelForCausalLM.from_config(config, **kwargs), tuple(layers), **options)
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"load_swapped: {path} does not fit its config: missing {sorted(set(missing) - tied)}, "
            f"unexpected {unexpected}"
        )
    model.tie_weights()
    return model
