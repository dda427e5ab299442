"""Packages that `pip install mor` leaves out, and what an import that misses one says."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the extra that brings what an import inside misses.

    Args:
        name: "train" or "plots", as in pyproject.toml.

    Raises:
        ImportError: a package is missing, or one of its own is.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'mor[{name}]' brings it") from error
