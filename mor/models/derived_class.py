"""Classes made at run time from those of a dense model, which copies and pickles make anew."""

import functools
import inspect
from typing import Any

__all__ = ["Derived", "derived_class", "forward_of", "parameters_of"]


class Derived:
    """What is put before a dense class; its methods find that class as `self.dense_class`."""

    mixin: type["Derived"]
    dense_class: Any

    @classmethod
    def attributes(cls, dense: type) -> dict[str, Any]:
        """Attributes of the class that depend on the dense one."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.mixin, self.dense_class), self.__getstate__()


_made: dict[tuple[type, type], Any] = {}


def derived_class(mixin: type[Derived], dense: type) -> Any:
    """The dense class with `mixin` before it, under the dense name: libraries know models by it."""
    if (mixin, dense) in _made:
        return _made[mixin, dense]
    names = {
        "mixin": mixin,
        "dense_class": dense,
        "__module__": dense.__module__,
        "__qualname__": dense.__qualname__,
        **mixin.attributes(dense),
    }
    made = type(dense.__name__, (mixin, dense), names)
    return _made.setdefault((mixin, dense), made)


def _new(mixin: type[Derived], dense: type) -> Any:
    """What pickle and deepcopy fill with an object's state."""
    kind = derived_class(mixin, dense)
    return kind.__new__(kind)


def forward_of(dense: Any) -> Any:
    """`call_dense` with the dense forward's signature, by which libraries choose arguments.

    `call_dense` gets every argument by its name.
    """

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call_dense(**{**kwargs, **dict(zip(parameters_of(dense), args, strict=False))})

    return forward


@functools.cache
def parameters_of(dense: Any) -> tuple[str, ...]:
    """Names of the arguments of a dense model's forward."""
    parameters = inspect.signature(dense.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)[1:]
