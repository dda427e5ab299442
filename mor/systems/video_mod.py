"""VideoLLM-MoD on a loaded LLaVA for videos: every other layer takes a fifth of each frame."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mor.schedules import Schedule
from mor.systems.ratios import layer_ratios
from mor.systems.video_mod_layer import VideoMoD
from mor.systems.vision_layer import VisionLayer
from mor.systems.vision_model import VisionModel, check_vision_model, put_in, vision_class
from mor.systems.vision_tokens import FrameSizes, VisionCall, VisionTokens

__all__ = ["apply_video_mod", "class_for"]

MODELS = ("llava_next_video", "llava_onevision")


def apply_video_mod(
    model: PreTrainedModel, ratio: float | Schedule = 0.2, every: int = 2
) -> PreTrainedModel:
    """Makes layers of a loaded LLaVA for videos VideoLLM-MoD layers, in place.

    A routed layer becomes a `VideoMoD` layer, which keeps the best vision tokens of each frame;
    text, and so every new token, takes all layers, and so do pictures that are no videos. Each
    layer caches keys and values of the tokens that took it.

    The choice depends on the frame alone, so a clip may be given whole or as it comes: call the
    model with the tokens and pixels of the next frames and the same `past_key_values`. A call holds
    whole frames.

    Args:
        model: a LlavaNextVideoForConditionalGeneration or LlavaOnevisionForConditionalGeneration
            whose language model is a Llama, Mistral or Qwen2; it stays in the mode it is in.
        ratio: share of the vision tokens of a frame that take a routed layer, or a
            `mor.schedules.Schedule` of one ratio for each layer, in which layers of ratio 1 stay as
            they are.
        every: of a number: the layers every - 1, 2 * every - 1, ... are routed. The published
            setting, 0.2 in every other layer, is 0.6 of the layers' work on vision tokens.

    Returns:
        The same model. It trains (the routers learn by the weight of what a layer adds; there is no
        loss of theirs), generates and saves; `mor.load_swapped` loads it, and `mor.remove` makes it
        dense again. Routers begin near zero, at which kept tokens are changed little: train it.

    Raises:
        ValueError: another model, or a ratio or every that it does not take; the model is left as
            it was.

    Reference: VideoLLM-MoD (arXiv 2408.16730).
    """
    check_vision_model(model, "apply_video_mod", MODELS)
    num_layers = model.config.text_config.num_hidden_layers
    ratios = layer_ratios("apply_video_mod", "ratio", ratio, every, num_layers)
    return put_in(model, _VideoModel, {"system": "video_mod", "ratios": list(ratios)})


def class_for(config: Any) -> Any:
    """Class of the model that a saved configuration describes, for `mor.load_swapped`."""
    return vision_class(_VideoModel, config)


class _VideoModel(VisionModel):
    """Before the class of a dense LLaVA for videos."""

    @staticmethod
    def layer_class() -> type[VisionLayer]:
        return VideoMoD

    def make_layer(
        self, layer: nn.Module, index: int, ratio: float, settings: dict[str, Any]
    ) -> VisionLayer:
        text = self.config.text_config
        return VideoMoD(layer, text.hidden_size, index, text.num_hidden_layers, ratio)

    def vision_call(self, kwargs: dict[str, Any]) -> VisionCall:
        ids, frame = kwargs["input_ids"], _tokens_per_frame(self.config)
        pixels = kwargs.get("pixel_values_videos")
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        video = 0  # without videos their token is text, as when the model generated one
        if self.config.model_type == "llava_next_video":  # its videos are frames and nothing else
            video = 0 if pixels is None and encoded is None else frame
        elif pixels is not None:
            video = pixels.shape[1] * frame + 1
        elif encoded is not None:
            video = encoded.pooler_output[0].shape[0]
            if video % frame > 1:
                raise ValueError(
                    f"apply_video_mod: mm_encoder_outputs: expected frames of {frame} tokens and a "
                    f"newline, got a video of {video} tokens: a call holds whole frames"
                )
        return VisionCall(
            "apply_video_mod",
            ids == self.config.video_token_id if video else torch.zeros_like(ids).bool(),
            partial(
                VisionTokens.of_frames, sizes=FrameSizes(frame, video), where="apply_video_mod"
            ),
            attention_mask=kwargs.get("attention_mask"),
            described=kwargs.get("position_ids") is not None,
        )


def _tokens_per_frame(config: Any) -> int:
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type == "llava_onevision":
        return (-(-side // 2)) ** 2
    return int(side // config.spatial_pool_stride) ** 2
