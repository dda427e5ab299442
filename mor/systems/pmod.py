"""p-MoD on a loaded LLaVA: deeper layers take fewer and fewer of the vision tokens."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mor.schedules import RATIO, Schedule, shifted_cosine
from mor.systems.pmod_layer import PMoD
from mor.systems.vision_layer import VisionLayer
from mor.systems.vision_model import VisionModel, check_vision_model, put_in, vision_class
from mor.systems.vision_tokens import VisionCall

__all__ = ["apply_pmod", "class_for"]

MODELS = ("llava", "llava_next")


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
    check_vision_model(model, "apply_pmod", MODELS)
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
    if schedule.unit != RATIO or min(schedule) == 1:
        raise ValueError(
            f"apply_pmod: schedule: expected ratios, some below 1, got {schedule.name}"
        )
    return put_in(
        model, _PModModel, {"system": "pmod", "ratios": list(schedule), "alpha": float(alpha)}
    )


def class_for(config: Any) -> Any:
    """Class of the model that a saved configuration describes, for `mor.load_swapped`."""
    return vision_class(_PModModel, config)


class _PModModel(VisionModel):
    """Before the class of a dense LLaVA."""

    @staticmethod
    def layer_class() -> type[VisionLayer]:
        return PMoD

    def make_layer(
        self, layer: nn.Module, index: int, ratio: float, settings: dict[str, Any]
    ) -> VisionLayer:
        text = self.config.text_config
        size = text.hidden_size, index, text.num_hidden_layers
        return PMoD(layer, *size, ratio, settings["alpha"])

    def vision_call(self, kwargs: dict[str, Any]) -> VisionCall:
        # Without images the model takes their token for text, as when it generated one.
        has_images = any(kwargs.get(n) is not None for n in ("pixel_values", "mm_encoder_outputs"))
        ids = kwargs["input_ids"]
        return VisionCall(
            "apply_pmod",
            ids == self.config.image_token_id if has_images else torch.zeros_like(ids).bool(),
            attention_mask=kwargs.get("attention_mask"),
            described=kwargs.get("position_ids") is not None,
        )
