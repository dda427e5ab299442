"""What `mor.apply_*` changes in a loaded model, and `mor.remove`, which takes it back."""

from typing import Any, Protocol, TypeVar

from torch import nn

__all__ = ["Undo", "add_behaviour", "drop_behaviour", "record", "remove"]

_RECORDS = "_mor_applied"
Model = TypeVar("Model", bound=nn.Module)


class Undo(Protocol):
    """How to take one `apply_*` back. Plain data: it is pickled and copied with the model."""

    def undo(self, model: nn.Module) -> None:
        """Puts the model back as it was."""


def record(model: nn.Module, how: Undo) -> None:
    """Keeps `how` for `remove`."""
    model.__dict__.setdefault(_RECORDS, []).append(how)


def remove(model: Model) -> Model:
    """Takes back everything that `mor.apply_*` did to a model, the last first.

    Returns:
        The same model, with the modules, weights and outputs it had before.

    Raises:
        ValueError: nothing was applied to this model.
    """
    applied = model.__dict__.get(_RECORDS)
    if not applied:
        raise ValueError(
            f"remove: expected a model changed by mor.apply_*, got a {type(model).__name__} "
            "without a change; pass the module that mor.apply_* was given"
        )
    while applied:
        applied.pop().undo(model)
    del model.__dict__[_RECORDS]
    return model


#: Classes made at run time, by their parents.
_CLASSES: dict[tuple[type[Any], type[Any]], type[Any]] = {}


class _Added:
    """Pickles and copies an object whose class was made at run time, by its two parents."""

    parents: tuple[type[Any], type[Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_instance, self.parents, self.__dict__.copy()


def add_behaviour(module: nn.Module, behaviour: type[Any]) -> None:
    """Lets the methods of `behaviour` go before those of the module's class.

    The module keeps its name, parameters and place, so that checkpoints, `isinstance` and lists of
    class names (FSDP, device maps) see what they saw before.
    """
    module.__class__ = _joined(behaviour, type(module))


def drop_behaviour(module: nn.Module) -> None:
    """Takes `add_behaviour` back."""
    module.__class__ = type(module).parents[1]  # type: ignore[attr-defined]


def _joined(behaviour: type[Any], base: type[Any]) -> type[Any]:
    parents = behaviour, base
    if parents not in _CLASSES:
        names = {"__module__": base.__module__, "parents": parents}
        _CLASSES[parents] = type(base.__name__, (_Added, *parents), names)
    return _CLASSES[parents]


def _empty_instance(behaviour: type[Any], base: type[Any]) -> Any:
    return object.__new__(_joined(behaviour, base))
