"""A LLaVA some of whose decoder's layers some vision tokens skip: checked, made, and made dense."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from mor.models.arguments import refuse_unused
from mor.models.attention import check_attention
from mor.models.derived_class import derived_class, forward_of, parameters_of
from mor.models.swap.saved_model import SavedWithSettings
from mor.models.swap.settings import caller_of
from mor.models.swap.swapped_model import check_cache_and_mask
from mor.systems.vision_layer import VisionLayer
from mor.systems.vision_tokens import VisionCall

__all__ = ["VisionModel", "check_vision_model", "put_in", "take_off", "vision_class"]

#: Language models whose layers are `x + attention(norm(x))`, then `x + mlp(norm(x))`.
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")

#: Of a call, besides the parameters of the dense model's forward.
_PASSED_ON = (
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "num_items_in_batch",
    "shift_labels",
)


def check_vision_model(model: Any, where: str, models: Sequence[str]) -> None:
    """Refuses what cannot be routed.

    Args:
        model: what the user gave.
        where: begins the errors.
        models: model types that are taken.

    Raises:
        ValueError: another model, or one whose language model is not one of `LANGUAGE_MODELS`.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in models:
        raise ValueError(f"{where}: expected a model of one of {list(models)}, got {kind!r}")
    if hasattr(config, "mor_swap"):
        raise ValueError(f"{where}: the model has routed layers already")
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if not isinstance(model, whole):
        raise ValueError(f"{where}: expected a {whole.__name__}, got {type(model).__name__}")
    text = config.text_config
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{where}: expected a language model of one of {list(LANGUAGE_MODELS)}, got "
            f"{text.model_type!r}"
        )
    check_attention(text, where)
    if len(kinds := sorted(set(getattr(text, "layer_types", None) or ()))) > 1:
        raise ValueError(f"{where}: expected layers of one attention type, got {kinds}")


class VisionModel(SavedWithSettings):
    """Before the class of a dense LLaVA."""

    training: bool

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense model, and layers that stay on one device."""
        layer = cls.layer_class().__name__
        split = {*(getattr(dense, "_no_split_modules", None) or ()), layer}
        return {"forward": forward_of(dense), "_no_split_modules": sorted(split)}

    @staticmethod
    def layer_class() -> type[VisionLayer]:
        """Class of the routed layers."""
        raise NotImplementedError

    def make_layer(
        self, layer: nn.Module, index: int, ratio: float, settings: dict[str, Any]
    ) -> VisionLayer:
        """The routed layer in place of one of the decoder's."""
        raise NotImplementedError

    def vision_call(self, kwargs: dict[str, Any]) -> VisionCall:
        """Describe a call of the model with these arguments; `input_ids` is among them."""
        raise NotImplementedError

    def put_back(self, settings: dict[str, Any]) -> None:
        """Routes the layers that `settings` name."""
        decoder: Any = self.model.language_model  # type: ignore[attr-defined]
        attention = copy.deepcopy(decoder.config)
        attention._attn_implementation = "mor"
        for index, ratio in enumerate(settings["ratios"]):
            if ratio == 1:
                continue
            layer = decoder.layers[index]
            layer.get_submodule("self_attn").config = attention
            made = self.make_layer(layer, index, ratio, settings)
            made.train(layer.training)
            made.router.to(device=next(layer.parameters()).device, dtype=self.dtype)  # type: ignore[attr-defined]
            decoder.layers[index] = made

    def call_dense(self, **kwargs: Any) -> Any:
        """The dense model's forward, told which tokens are vision tokens."""
        where = caller_of(self.config.mor_swap)
        known = (*parameters_of(self.dense_class), *_PASSED_ON)
        refuse_unused(
            {name: value for name, value in kwargs.items() if name not in known},
            self.config,
            where,
        )
        if kwargs.get("input_ids") is None:
            raise ValueError(
                f"{where}: expected input_ids, by which vision tokens are known, got none"
            )
        check_cache_and_mask(where, kwargs, self.training)
        kwargs["mor_call"] = self.vision_call(kwargs)
        return self.dense_class.forward(self, **kwargs)


def put_in(
    model: PreTrainedModel, mixin: type[VisionModel], settings: dict[str, Any]
) -> PreTrainedModel:
    """Makes a dense model one with the routed layers that `settings` describe, in place."""
    model.config.mor_swap = settings
    model.config._name_or_path = ""  # of the dense model, which trainers would take as reference
    model.__class__ = derived_class(mixin, type(model))
    routed: Any = model
    routed.put_back(settings)
    return model


def take_off(model: Any) -> None:
    """Make such a model dense again, for `mor.remove`."""
    decoder = model.model.language_model
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer, VisionLayer):
            layer.layer.get_submodule("self_attn").config = decoder.config
            decoder.layers[index] = layer.layer
    model.__class__ = model.dense_class
    del model.config.mor_swap


def vision_class(mixin: type[VisionModel], config: Any) -> Any:
    """Class of the model that a saved configuration describes."""
    return derived_class(mixin, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
