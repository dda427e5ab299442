"""mor.remove: takes off again what an `apply_` function did to a model."""

from typing import Any

from mor.models.swap.swapped_model import uninstall
from mor.systems.applied import applied, undo
from mor.systems.vision_model import VisionModel, take_off

__all__ = ["remove"]


def remove(model: Any) -> Any:
    """Makes a model dense again, in place: its layers stand where they stood, with their weights.

    Routers are dropped. A model that was not trained since has the logits that it had before, bit
    for bit.

    Args:
        model: what an `apply_` function returned, or `swap` with layers that are used once.

    Returns:
        The same model.

    Raises:
        ValueError: a model that nothing was applied to, or a swapped one whose layers recur.
    """
    if applied(model):
        undo(model)
        return model
    settings = getattr(getattr(model, "config", None), "mor_swap", None)
    if not settings:
        raise ValueError(
            f"remove: expected a model that mor changed, got a {type(model).__name__} as it was"
        )
    (take_off if isinstance(model, VisionModel) else uninstall)(model)
    return model
