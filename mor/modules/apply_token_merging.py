"""`mor.apply_token_merging`: token merging in a loaded model."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from mor.modules.applied import record
from mor.modules.merged_vision import find_encoder, merge_encoder

__all__ = ["apply_token_merging"]

Model = TypeVar("Model", bound=nn.Module)


def apply_token_merging(
    model: Model, r: int | Sequence[int], *, proportional: bool = True
) -> Model:
    """Lets the layers of a vision encoder merge similar tokens (ToMe); `mor.remove` takes it off.

    Works on the ViT, DeiT, CLIP and SigLIP encoders of Transformers and on the VisionTransformer of
    timm, alone or inside a larger model. Parameters, their names and what is saved stay as they
    are: apply it again to a model that was loaded. After the last layer every token has a state
    again, that of the token it was merged into, so that heads and pooling see what they saw before;
    states between the layers (`output_hidden_states`) are shorter. `model.token_merging` says which
    tokens the last call merged.

    Args:
        model: changed in place.
        r: pairs to merge in each layer: one integer for all, or one for each layer. At most half
            of the tokens left are merged. Class, distillation and register tokens never are.
        proportional: adds the logarithm of a token's size to its attention scores. False is for
            encoders trained as masked autoencoders.

    Returns:
        The model.

    Raises:
        ValueError: a model without such an encoder or with merging already, attention dropout, or
            a wrong r.

    Reference: Bolya et al., Token Merging (arXiv 2210.09461), section 3.
    """
    if hasattr(model, "token_merging"):
        raise ValueError(
            "apply_token_merging: expected a model without token merging; call mor.remove first"
        )
    found = find_encoder(model)
    if found is None:
        raise ValueError(
            "apply_token_merging: expected a ViT, DeiT, CLIP or SigLIP model of Transformers or a "
            f"VisionTransformer of timm, got a {type(model).__name__}"
        )
    merging = merge_encoder(model, *found, r, proportional)
    model.__dict__["token_merging"] = merging
    record(model, merging)
    return model
