"""A dense model some of whose layers are routed: what `mor.swap` makes of its class.

The class of a swapped model is that of the dense model with a few methods before it. It is made at
run time, so copies and pickles make it anew; nothing is hooked, and what a call needs to know
travels in the call, as `SwapCall`.

Over 300 lines in one file: the two classes, of the decoder and of the language model, are read
together.
"""

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mor.models.arguments import (
    REDUNDANT,
    refuse_generation_options,
    refuse_unused,
    wants_tuple,
)
from mor.models.attention import check_attention
from mor.models.configuration_mor import MoRConfig
from mor.models.derived_class import Derived, derived_class
from mor.models.outputs import MoRCausalLMOutput, MoRModelOutput
from mor.models.router_losses import TellsLostLosses, hand_over, take_back, tell_lost
from mor.models.swap.routed_layers import RoutedLayers, SwapCall
from mor.models.targets import at_least_one, batch_share, num_targets
from mor.modules.mixture_of_depths import depth_options

__all__ = [
    "caller_of",
    "coefficients_of",
    "install",
    "saved_config",
    "span_of",
    "swapped_class",
    "uninstall",
]

#: In the saved configuration, so that Auto classes refuse what they would load as a dense model.
_SAVED_MODEL_TYPE = "mor_swap"
_DENSE_MODEL_TYPE = "dense_model_type"

_HUB_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)

#: Of a call, besides the parameters of the dense model's forward.
_PASSED_ON = (
    "mor_call",
    "generating",
    "return_dict",
    "output_hidden_states",
    "num_items_in_batch",
    "shift_labels",
)

_COEFFICIENTS = {"aux_loss": 0.001, "balancing_loss": 0.1, "z_loss": 1e-5}


@dataclass(frozen=True)
class _Block:
    """A routed block to be put into a dense model: `RoutedLayers` in place of `span`."""

    span: range
    kept: int
    slots: Sequence[int]
    num_recursions: int
    router: str
    options: Mapping[str, Any]


def install(model: PreTrainedModel, settings: dict[str, Any]) -> list[RoutedLayers]:
    """Puts the routed blocks that `settings` describe (see `swap`, `apply_mod`) into a dense model.

    Raises:
        ValueError: see `swap`; the model is left as it was.
    """
    coefficients_of(settings)
    stack, where = model.model.layers, caller_of(settings)
    if where == "apply_mod":
        blocks = _depth_blocks(len(stack), settings)
    else:
        blocks = [_recursed_block(len(stack), settings)]
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


def caller_of(settings: Mapping[str, Any]) -> str:
    """The function that was given these settings; begins the errors."""
    return "apply_mod" if settings.get("system") == "mod" else "swap"


def _depth_blocks(num_layers: int, settings: dict[str, Any]) -> list[_Block]:
    """One layer each, wherever the capacity is below 1."""
    options = {k: v for k, v in settings.items() if k not in ("system", "loss_coefficients")}
    ratios = options.pop("ratios")
    if len(ratios) != num_layers:
        raise ValueError(
            f"apply_mod: capacity: expected a ratio for each of the {num_layers} layers, got "
            f"{len(ratios)}"
        )
    return [
        _Block(
            range(index, index + 1),
            1,
            [index],
            1,
            "expert",
            depth_options("apply_mod", ratio, options),
        )
        for index, ratio in enumerate(ratios)
        if ratio < 1
    ]


def _recursed_block(num_layers: int, settings: dict[str, Any]) -> _Block:
    options = dict(settings)
    layers, num_recursions, router = (
        options.pop(name) for name in ("layers", "num_recursions", "router")
    )
    options.pop("loss_coefficients", None)
    span = span_of(layers)
    if not 0 <= span.start < span.stop <= num_layers:
        got = layers if isinstance(layers, int) else (span.start, span.stop)
        raise ValueError(
            f"swap: expected the index of a layer below {num_layers}, or (first, end) with "
            f"0 <= first < end <= {num_layers}, got {got}"
        )
    if num_recursions < 1:
        raise ValueError(f"swap: expected num_recursions of at least 1, got {num_recursions}")
    slots, kept = list(span), len(span)
    if isinstance(layers, int):
        slots += range(num_layers, num_layers + num_recursions - 1)
    elif len(span) % num_recursions:
        raise ValueError(
            f"swap: {num_recursions} recursions must divide the {len(span)} layers of {span}; one "
            f"layer to be used again and again is given by its index, as in layers={span.start}"
        )
    else:
        kept = len(span) // num_recursions
    return _Block(span, kept, slots, num_recursions, router, options)


def coefficients_of(settings: dict[str, Any]) -> dict[str, float]:
    """Weights of the router's losses of a swapped model, defaults filled in."""
    given = settings.get("loss_coefficients") or {}
    if unknown := set(given) - set(_COEFFICIENTS):
        raise ValueError(
            f"{caller_of(settings)}: loss_coefficients: expected names among "
            f"{list(_COEFFICIENTS)}, got {sorted(unknown)}"
        )
    return {**_COEFFICIENTS, **given}


def span_of(layers: Any) -> range:
    """The layers that an argument `layers` of `swap` names."""
    if isinstance(layers, int):
        return range(layers, layers + 1)
    if isinstance(layers, range):
        return layers
    if isinstance(layers, Sequence) and [type(bound) for bound in layers] == [int, int]:
        return range(layers[0], layers[1])
    raise ValueError(
        "swap: expected layers to be a range, (first, one after the last) or the index of one "
        f"layer, got {layers!r}"
    )


class _SwappedDecoder(Derived):
    """Before the class of a dense decoder (`LlamaModel`)."""

    config: Any
    training: bool

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense decoder, and a block that stays on one device."""
        split = {*(getattr(dense, "_no_split_modules", None) or ()), "RoutedLayers"}
        return {"forward": _forward(dense), "_no_split_modules": sorted(split)}

    def call_dense(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(_parameters(self.dense_class), args, strict=False)
        known = (*_parameters(self.dense_class), *_PASSED_ON)
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        described = kwargs.get("position_ids") is not None
        where = caller_of(self.config.mor_swap)
        refuse_unused(unknown, self.config, where, described)
        if described:  # the dense layers may make use of them
            kwargs |= {name: value for name, value in unknown.items() if name in REDUNDANT}
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
        if kwargs.setdefault("use_cache") is None and cache is None and self.training:
            kwargs["use_cache"] = False  # a recomputation would append twice
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


class _SwappedModel(TellsLostLosses, Derived):
    """Before the class of a dense language model (`LlamaForCausalLM`)."""

    config: Any
    generation_config: Any

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
            "forward": _forward(dense),
            "prepare_inputs_for_generation": prepare_inputs_for_generation,
            "_keep_in_fp32_modules_strict": kept,
        }

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self.dense_class.__init__(self, config, *args, **kwargs)
        install(self, config.mor_swap)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `mor.load_swapped`: what trainers load a model's checkpoints by."""
        config = saved_config(path, **kwargs) if config is None else config
        return super().from_pretrained(path, *args, config=config, **kwargs)  # type: ignore[misc]

    def call_dense(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(_parameters(self.dense_class), args, strict=False)
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense model, in training mode too.

        Raises:
            ValueError: a cache_implementation other than dynamic, or assistant_early_exit.
        """
        refuse_generation_options(self.generation_config, args, kwargs)
        return self.dense_class.generate(self, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model with a configuration that only `mor.load_swapped` takes."""
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if push_to_hub and name in kwargs}
        self.dense_class.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if is_main_process and path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("keys_to_ignore_at_inference", None)
            if "mor_swap" in values and values["model_type"] != _SAVED_MODEL_TYPE:
                # Not inside mor_swap: Transformers looks for a "model_type" in what a file holds.
                values |= {_DENSE_MODEL_TYPE: values["model_type"], "model_type": _SAVED_MODEL_TYPE}
                text = json.dumps(values, indent=2, sort_keys=True) + "\n"
                path.write_text(text, encoding="utf-8")
        if push_to_hub:  # which saves once more, and uploads
            name = hub.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(name, **hub)  # type: ignore[attr-defined]


def saved_config(path: str | Path, **kwargs: Any) -> Any:
    """The dense model's configuration, `mor_swap` in it, that `save_pretrained` wrote.

    Args:
        path: the directory, or a name on the hub.
        **kwargs: of `from_pretrained`, those that say which files among them.

    Raises:
        ValueError: a model that was not swapped.
    """
    values, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    if not values.get("mor_swap"):
        raise ValueError(f"load_swapped: {path} holds no swapped model (no mor_swap in its config)")
    kind = values.pop(_DENSE_MODEL_TYPE, values["model_type"])
    return CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})


def swapped_class(dense: type[PreTrainedModel]) -> Any:
    """The class of a swapped model: that of a dense one, routing and its losses added."""
    return derived_class(_SwappedModel, dense)


def _forward(dense: Any) -> Any:
    """`call_dense` with the dense forward's signature, by which libraries choose arguments."""

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call_dense(*args, **kwargs)

    return forward


@functools.cache
def _parameters(dense: type[PreTrainedModel]) -> tuple[str, ...]:
    parameters = inspect.signature(dense.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)[1:]
