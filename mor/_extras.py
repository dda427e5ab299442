"""Optional packages, and an error that names the extra of a missing one."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra that brings a package which an import inside misses.

    Args:
        name: "train", "plots" or "serve", as in pyproject.toml.

    Raises:
        ImportError: a package is missing, or one of its own is.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'mor[{name}]' brings it") from error
