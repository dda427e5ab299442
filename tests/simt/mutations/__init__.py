"""Seeded bugs of the CUDA operators: a table for each operator, named as it is.

test_simt_mutations.py asserts that tests/ops/test_OP.py finds every one. A new operator joins by a
file of its own with a list `MUTATIONS`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

__all__ = ["Mutation", "all_mutations"]


@dataclass(frozen=True)
class Mutation:
    """One change of one file that some test must notice.

    Attributes:
        id: what goes wrong.
        file: in kernels/.
        old: text that stands there exactly once.
        new: what stands there instead.
        tests: which tests must notice, an expression for pytest's -k.
        build: plain (wrong results), race (missing synchronisation) or asan (bounds).
        dtype: the only one that is compiled and tested, to save time.
        sample: whether `make test` runs it.
    """

    id: str
    file: str
    old: str
    new: str
    tests: str
    build: str = "plain"
    dtype: str | None = None
    sample: bool = False


def all_mutations() -> list[tuple[str, Mutation]]:
    """Every mutation with the name of its operator."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return [(n, m) for n in names for m in import_module(f"mutations.{n}").MUTATIONS]
