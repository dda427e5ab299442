"""Behaviour added to a module of a loaded model by its class, and taken off again."""

from typing import Any

from torch import nn

__all__ = ["add_behaviour", "drop_behaviour"]

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
