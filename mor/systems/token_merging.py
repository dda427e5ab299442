"""`mor.apply_token_merging`: token merging in a loaded model."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from mor.systems.applied import record
from mor.systems.merged_diffusion import DiffusionOptions, find_blocks, merge_blocks
from mor.systems.merged_vision import find_encoder, merge_encoder

__all__ = ["apply_token_merging"]

Model = TypeVar("Model", bound=nn.Module)


def apply_token_merging(
    model: Model, r: int | Sequence[int] | None = None, *, proportional: bool = True, **options: Any
) -> Model:
    """Lets a loaded model merge similar tokens; `mor.remove` takes it off.

    Parameters, their names and what is saved stay as they are: apply it again to a model that was
    loaded. `model.token_merging` holds what the last call merged.

    Vision encoders (ToMe): ViT, DeiT, CLIP and SigLIP of Transformers and the VisionTransformer of
    timm, alone or inside a larger model. After the last layer every token has a state again, that
    of the token it was merged into, so that heads and pooling see what they saw before; states
    between the layers (`output_hidden_states`) are shorter. They take `r` and `proportional`.

    Diffusion models (tomesd, CA-ToMe): U-Nets and DiT of diffusers. Tokens of the image merge
    before the self-attention of a block and get their results back behind it. They take the
    options below, `ratio` or `threshold` among them.

    Args:
        model: changed in place.
        r: pairs to merge in each layer: one integer for all, or one for each layer. At most half
            of the tokens left are merged. Class, distillation and register tokens never are.
        proportional: adds the logarithm of a token's size to its attention scores. False is for
            encoders trained as masked autoencoders.
        **options: of a diffusion model.

            - `ratio`: share of the tokens to merge, in [0, 1). Destinations always stay.
            - `threshold`: instead of `ratio`, a cosine. Every token that is at least as similar to
              its best destination merges, as many as there are in each image.
            - `cell`: rows and columns of tokens of which one is the destination; default (2, 2).
            - `max_downsample`: merge in blocks with at most this reduction of the image; default 1.
            - `seed`: chooses the destinations, anew in each step; None takes the first of each
              cell.
            - `checkpoints`: steps of a request at which its plans are made; the steps between them
              use the last ones. Announce each request by `model.token_merging.start(request,
              num_calls)`. Default: every step. `mor.systems.merged_diffusion.CHECKPOINTS` are the
              published lists.

    Returns:
        The model.

    Raises:
        ValueError: a model that cannot merge or does already, attention dropout, or a wrong option.

    Reference: Bolya et al. (arXiv 2210.09461), section 3; Bolya and Hoffman (arXiv 2303.17604);
        Saghatchian et al. (arXiv 2501.00946).
    """
    if hasattr(model, "token_merging"):
        raise ValueError(
            "apply_token_merging: expected a model without token merging; call mor.remove first"
        )
    found = find_encoder(model)
    if found is not None:
        if r is None or options:
            raise ValueError(
                "apply_token_merging: expected r, and at most proportional, for a vision encoder, "
                f"got r={r!r}{''.join(f', {name}' for name in options)}"
            )
        merging: Any = merge_encoder(model, *found, r, proportional)
    elif type(model).__module__.startswith("diffusers.") and find_blocks(model):
        unknown = [name for name in options if name not in DiffusionOptions.__dataclass_fields__]
        if r is not None or not proportional or unknown:
            raise ValueError(
                "apply_token_merging: expected options of a diffusion model "
                f"({', '.join(DiffusionOptions.__dataclass_fields__)}), got "
                f"{', '.join(unknown) or 'r or proportional'}"
            )
        merging = merge_blocks(model, DiffusionOptions(**options))
    else:
        raise ValueError(
            "apply_token_merging: expected a ViT, DeiT, CLIP or SigLIP model of Transformers, a "
            "VisionTransformer of timm or a diffusers model of BasicTransformerBlocks, got a "
            f"{type(model).__name__}"
        )
    model.__dict__["token_merging"] = merging
    record(model, "token_merging", merging.undo)
    return model
