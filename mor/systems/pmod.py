"""p-MoD on a loaded LLaVA: deeper layers take fewer and fewer of the vision tokens."""

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from mor.models.arguments import refuse_unused
from mor.models.attention import check_attention
from mor.models.derived_class import derived_class, forward_of, parameters_of
from mor.models.swap.saved_model import SavedWithSettings
from mor.models.swap.swapped_model import check_cache_and_mask
from mor.schedules import Schedule, shifted_cosine
from mor.systems.pmod_layer import PMoD, VisionCall

__all__ = ["apply_pmod", "class_for", "take_off"]

MODELS = ("llava", "llava_next")
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


def apply_pmod(
    model: PreTrainedModel, schedule: Schedule | None = None, *, alpha: float = 0.2
) -> PreTrainedModel:
    """Makes layers of a loaded LLaVA p-MoD layers, in place.

    A layer with a ratio below 1 becomes a `PMoD` layer, which keeps that share of the vision tokens
    of each prompt; text, and so every new token, takes all layers. Each layer caches keys and
    values of the tokens that took it.

    Args:
        model: a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration whose language
            model is a Llama, Mistral or Qwen2; it stays in the mode it is in.
        schedule: a ratio for each layer of the language model; default: `shifted_cosine`, the
            published setting, whose mean share of vision tokens is 0.5375.
        alpha: of TanhNorm, `w = 1 + alpha * tanh(logit)`.

    Returns:
        The same model. It trains (the routers learn by w; there is no loss of theirs), generates
        and saves; `mor.load_swapped` loads it, and `mor.remove` makes it dense again. Routers begin
        at zero, at which every w is 1 and ties go to earlier tokens.

    Raises:
        ValueError: another model, a schedule of another length, an alpha outside [0, 1); the model
            is left as it was.

    Reference: p-MoD (arXiv 2412.04449).
    """
    _check_model(model)
    text = model.config.text_config
    if not isinstance(alpha, int | float) or not 0 <= alpha < 1:
        raise ValueError(f"apply_pmod: alpha: expected a number in [0, 1), got {alpha!r}")
    if schedule is None:
        schedule = shifted_cosine(text.num_hidden_layers)
    if not isinstance(schedule, Schedule) or len(schedule) != text.num_hidden_layers:
        got = f"one of {len(schedule)}" if isinstance(schedule, Schedule) else repr(schedule)
        raise ValueError(
            f"apply_pmod: schedule: expected a Schedule of {text.num_hidden_layers} layers, got "
            f"{got}"
        )
    if max(schedule) > 1 or min(schedule) == 1:
        raise ValueError(
            f"apply_pmod: schedule: expected ratios, some below 1, got {schedule.name}"
        )
    settings = {"system": "pmod", "ratios": list(schedule), "alpha": float(alpha)}
    _install(model, settings)
    model.config.mor_swap = settings
    model.config._name_or_path = ""  # of the dense model, which trainers would take as reference
    model.__class__ = derived_class(_PModModel, type(model))
    return model


def take_off(model: Any) -> None:
    """What `mor.remove` does to a model of `apply_pmod`."""
    decoder = model.model.language_model
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer, PMoD):
            layer.layer.get_submodule("self_attn").config = decoder.config
            decoder.layers[index] = layer.layer
    model.__class__ = model.dense_class
    del model.config.mor_swap


def class_for(config: Any) -> Any:
    """The class of a saved model's configuration."""
    return derived_class(_PModModel, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])


def _check_model(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODELS:
        raise ValueError(f"apply_pmod: expected a model of one of {list(MODELS)}, got {kind!r}")
    if hasattr(config, "mor_swap"):
        raise ValueError("apply_pmod: the model has routed layers already")
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if not isinstance(model, whole):
        raise ValueError(f"apply_pmod: expected a {whole.__name__}, got {type(model).__name__}")
    text = config.text_config
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"apply_pmod: expected a language model of one of {list(LANGUAGE_MODELS)}, got "
            f"{text.model_type!r}"
        )
    check_attention(text, "apply_pmod")
    if len(kinds := sorted(set(getattr(text, "layer_types", None) or ()))) > 1:
        raise ValueError(f"apply_pmod: expected layers of one attention type, got {kinds}")


def _install(model: Any, settings: dict[str, Any]) -> None:
    decoder, text = model.model.language_model, model.config.text_config
    attention = copy.deepcopy(decoder.config)
    attention._attn_implementation = "mor"
    for index, ratio in enumerate(settings["ratios"]):
        if ratio == 1:
            continue
        layer = decoder.layers[index]
        layer.get_submodule("self_attn").config = attention
        size = text.hidden_size, index, text.num_hidden_layers
        made = PMoD(layer, *size, ratio, settings["alpha"])
        made.train(layer.training)
        made.router.to(device=next(layer.parameters()).device, dtype=model.dtype)
        decoder.layers[index] = made


class _PModModel(SavedWithSettings):
    """Before the class of a dense LLaVA."""

    training: bool

    @classmethod
    def attributes(cls, dense: Any) -> dict[str, Any]:
        """The call of the dense model, and layers that stay on one device."""
        split = {*(getattr(dense, "_no_split_modules", None) or ()), "PMoD"}
        return {"forward": forward_of(dense), "_no_split_modules": sorted(split)}

    def put_back(self, settings: dict[str, Any]) -> None:
        """`apply_pmod`."""
        _install(self, settings)

    def call_dense(self, **kwargs: Any) -> Any:
        known = (*parameters_of(self.dense_class), *_PASSED_ON)
        refuse_unused(
            {name: value for name, value in kwargs.items() if name not in known},
            self.config,
            "apply_pmod",
        )
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "apply_pmod: expected input_ids, by which vision tokens are known, got none"
            )
        check_cache_and_mask("apply_pmod", kwargs, self.training)
        # Without images the model takes their token for text, as when it generated one.
        has_images = any(kwargs.get(n) is not None for n in ("pixel_values", "mm_encoder_outputs"))
        kwargs["mor_call"] = VisionCall(
            ids == self.config.image_token_id if has_images else torch.zeros_like(ids).bool(),
            kwargs.get("attention_mask"),
            kwargs.get("position_ids") is not None,
        )
        return self.dense_class.forward(self, **kwargs)
