"""What several workers of pytest-xdist build is built once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def only_one_builds(folder: Path) -> Iterator[None]:
    """Waits until no other process builds in `folder`; what is up to date then costs a look."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield
