"""The record of the `apply_*` functions that changed a model, and its undoing."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["applied", "record", "undo"]

_ATTRIBUTE = "_mor_applied"


def applied(model: nn.Module) -> tuple[str, ...]:
    """Names of what is applied to a model, oldest first."""
    return tuple(model.__dict__.get(_ATTRIBUTE, ()))


def record(model: nn.Module, name: str, undo: Callable[[Any], None]) -> None:
    """Notes what was applied; refuses a second time.

    Args:
        model: the model.
        name: of the method, as in `apply_NAME`.
        undo: called with the model, which may be a copy of this one: `undo` is copied and pickled
            with it, so it keeps what it needs as attributes.

    Raises:
        ValueError: a method that is applied already.
    """
    if name in applied(model):
        raise ValueError(f"apply_{name}: it is applied already; mor.remove(model) takes it off")
    model.__dict__.setdefault(_ATTRIBUTE, {})[name] = undo


def undo(model: nn.Module) -> None:
    """Takes off everything that was recorded, newest first."""
    undos = model.__dict__.pop(_ATTRIBUTE)
    for name in reversed(undos):
        undos[name](model)
