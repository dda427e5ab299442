"""A dense model some of whose layers are routed: what `mor.swap` makes of its class.

The class of a swapped model is that of the dense model with a few methods before it. It is made at
run time, so copies and pickles make it anew; nothing is hooked, and what a call needs to know
travels in the call, as `SwapCall`.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mor.models.arguments import REDUNDANT, refuse_unused, wants_tuple
from mor.models.attention import check_attention
from mor.models.configuration_mor import MoRConfig
from mor.models.derived_class import Derived, derived_class, forward_of, parameters_of
from mor.models.outputs import MoRCausalLMOutput, MoRModelOutput
from mor.models.router_losses import TellsLostLosses, hand_over, take_back, tell_lost
from mor.models.swap.routed_layers import RoutedLayers, SwapCall
from mor.models.swap.saved_model import SavedWithSettings
from mor.models.swap.settings import blocks_of, caller_of, coefficients_of
from mor.models.targets import at_least_one, batch_share, num_targets

__all__ = [
    "check_cache_and_mask",
    "install",
    "swapped_class",
    "uninstall",
]

#: Of a call, besides the parameters of the dense model's forward.
_PASSED_ON = (
    "mor_call",
    "generating",
    "return_dict",
    "output_hidden_states",
    "num_items_in_batch",
    "shift_labels",
)


def install(model: PreTrainedModel, settings: dict[str, Any]) -> list[RoutedLayers]:
    """Puts the routed blocks that `settings` describe (see `swap`, `apply_mod`) into a dense model.

    Raises:
        ValueError: see `swap`; the model is left as it was.
    """
    coefficients_of(settings)
    stack, where = model.model.layers, caller_of(settings)
    blocks = blocks_of(len(stack), settings)
    if any(isinstance(layer, RoutedLayers) for layer in stack):
        raise ValueError(f"{where}: the model has routed layers already")
    check_attention(model.config, where)
    kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
    if len(kinds) > 1:  # the model would hand the layers behind the block another kind's masks
        raise ValueError(
            f"{where}: expected layers of one attention type, got {kinds}; see MoRConfig"
        )
    layers, routed, end = [], [], 0
    for block in blocks:
        made = RoutedLayers(
            stack[block.span.start : block.span.start + block.kept],
            model.config,
            block.slots,
            block.num_recursions,
            block.router,
            where=where,
            **block.options,
        )
        made.train(model.training)
        layers += [*stack[end : block.span.start], made]
        end = block.span.stop
        routed.append(made)
    model.model.__class__ = derived_class(_SwappedDecoder, type(model.model))
    model.model.layers = nn.ModuleList([*layers, *stack[end:]])
    model.model.layers.training = model.training
    # What the Trainer does not gather when it evaluates.
    model.config.keys_to_ignore_at_inference = MoRConfig.keys_to_ignore_at_inference
    return routed


def uninstall(model: Any) -> None:
    """Puts the layers of routed blocks back: the model is dense again, with the same weights.

    Raises:
        ValueError: a block whose layers stood for others, which are gone.
    """
    stack = model.model.layers
    blocks = [layer for layer in stack if isinstance(layer, RoutedLayers)]
    if any(len(block.slots) != len(block.layers) for block in blocks):
        raise ValueError(
            "remove: expected layers that are used once, got a block whose layers recur: the "
            "layers that it replaced are gone; load the dense model again"
        )
    for block in blocks:
        for layer in block.layers:
            layer.get_submodule("self_attn").config = model.config
    dense = [one for layer in stack for one in (layer.layers if layer in blocks else [layer])]
    model.model.layers = nn.ModuleList(dense)
    model.model.layers.training = model.training
    model.model.__class__ = model.model.dense_class
    model.__class__ = model.dense_class
    del model.config.mor_swap
    vars(model.config).pop("keys_to_ignore_at_inference", None)


def check_cache_and_mask(where: str, kwargs: dict[str, Any], training: bool) -> None:
    """Checks the cache and the mask of a decoder's call, and keeps a cache out of training.

    Args:
        where: begins the errors.
        kwargs: of the call; `use_cache` is filled in.
        training: without a cache given, none is made: a recomputation would append twice.

    Raises:
        ValueError: another cache than `DynamicCache`, or a mask of another shape than
            [B, past + S].
    """
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        raise ValueError(
            f"{where}: expected past_key_values = DynamicCache(config=model.config), got "
            f"{type(cache).__name__}{' with offloading' if cache.offloading else ''}"
        )
    if mask is not None:
        ids = kwargs.get("input_ids")
        batch, length = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        want = [batch, length + (0 if cache is None else cache.get_seq_length())]
        got = "one for each kind of layer" if isinstance(mask, dict) else list(mask.shape)
        if got != want:
            raise ValueError(
                f"{where}: attention_mask: expected shape {want} (past columns among them), "
                f"got {got}; documents packed in a row are told apart by position_ids that "
                "restart at 0"
            )
    if kwargs.setdefault("use_cache") is None and cache is None and training:
        kwargs["use_cache"] = False


class _SwappedDecoder(Derived):
    """Before the class of a dense decoder (`LlamaModel`)."""

    config: Any
    training: bool

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense decoder, and a block that stays on one device."""
        split = {*(getattr(dense, "_no_split_modules", None) or ()), "RoutedLayers"}
        return {"forward": forward_of(dense), "_no_split_modules": sorted(split)}

    def call_dense(self, **kwargs: Any) -> Any:
        known = (*parameters_of(self.dense_class), *_PASSED_ON)
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        described = kwargs.get("position_ids") is not None
        where = caller_of(self.config.mor_swap)
        refuse_unused(unknown, self.config, where, described)
        if described:  # the dense layers may make use of them
            kwargs |= {name: value for name, value in unknown.items() if name in REDUNDANT}
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        check_cache_and_mask(where, kwargs, self.training)
        inside = "mor_call" in kwargs  # the language model takes no tuple of its decoder
        call = kwargs.setdefault("mor_call", SwapCall())
        call.attention_mask, call.described = mask, described
        continued = cache is not None or (self.training and bool(kwargs["use_cache"]))
        call.generating = kwargs.pop("generating", call.generating) or continued
        return_dict = kwargs.pop("return_dict", None)
        output = self.dense_class.forward(self, return_dict=True, **kwargs)
        routing, coefficients = call.routing, coefficients_of(self.config.mor_swap)
        assert isinstance(output, BaseModelOutputWithPast) and routing is not None
        losses = [
            coefficient * getattr(routing, name)
            for name, coefficient in coefficients.items()
            if getattr(routing, name) is not None
        ]
        call.output = MoRModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            token_depths=call.token_depths,
            aux_loss=routing.aux_loss,
            z_loss=routing.z_loss,
            balancing_loss=routing.balancing_loss,
            router_loss=torch.stack(losses).sum() if losses else None,
            routing=routing,
        )
        hand_over(call.output.router_loss, self.training)
        as_tuple = not inside and wants_tuple(return_dict, self.config)
        return call.output.to_tuple() if as_tuple else call.output


class _SwappedModel(TellsLostLosses, SavedWithSettings):
    """Before the class of a dense language model (`LlamaForCausalLM`)."""

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense model; in generation it says so."""

        @functools.wraps(dense.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = dense.prepare_inputs_for_generation(self, *args, **kwargs)
            inputs.pop("tokenizer", None)  # of stop_strings
            return {**inputs, "generating": True}

        kept = [*(getattr(dense, "_keep_in_fp32_modules_strict", None) or ()), "recursion.bias"]
        return {
            "forward": forward_of(dense),
            "prepare_inputs_for_generation": prepare_inputs_for_generation,
            "_keep_in_fp32_modules_strict": kept,
        }

    def put_back(self, settings: dict[str, Any]) -> None:
        """`install`."""
        install(self, settings)

    def call_dense(self, **kwargs: Any) -> Any:
        call = kwargs["mor_call"] = SwapCall(generating=kwargs.pop("generating", False))
        return_dict = kwargs.pop("return_dict", None)
        items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        if kwargs.get("labels") is None and shifted is not None:
            kwargs["labels"] = shifted  # which alone would give no loss
        labels = kwargs.get("labels")
        if labels is not None:
            count = num_targets(labels, shifted)
            kwargs["num_items_in_batch"] = at_least_one(count if items is None else items)
        output = self.dense_class.forward(self, return_dict=True, **kwargs)
        base = call.output
        assert base is not None
        loss = lm_loss = output.loss
        if loss is not None and labels is not None and base.router_loss is not None:
            loss = loss + batch_share(count, items) * base.router_loss
            take_back(base.router_loss)
        if labels is None:
            tell_lost(base.router_loss, items)
        routed = MoRCausalLMOutput.of(base, output.logits, loss, lm_loss)
        return routed.to_tuple() if wants_tuple(return_dict, self.config) else routed


def swapped_class(dense: type[PreTrainedModel]) -> Any:
    """The class of a swapped model: that of a dense one, routing and its losses added."""
    return derived_class(_SwappedModel, dense)
