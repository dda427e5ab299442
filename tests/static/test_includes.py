"""The rooms of csrc include only what lies below them."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
#: What each room of csrc/cpu may include beside itself; "base" is csrc/*.h.
BELOW = {
    "simd": {"base"},
    "memory": {"base", "tuning"},
    "routing": {"base", "ops", "simd", "tuning"},
    "rows": {"base", "ops", "simd", "memory", "tuning"},
    "match": {"base", "ops", "simd", "memory", "tuning"},
    "kv": {"base", "ops", "memory", "rows"},
    "products": {"base", "ops", "simd", "memory", "tuning"},
    "attention": {"base", "ops", "simd", "memory", "tuning"},
}


def room(path: Path) -> str:
    """The room a file of csrc lies in."""
    parts = path.relative_to(CSRC).parts
    if parts[0] == "cpu":
        return parts[1] if len(parts) == 3 else Path(parts[1]).stem
    return "base" if len(parts) == 1 else parts[0]


def included(path: Path) -> set[Path]:
    """The files of csrc that a file names."""
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return {
        CSRC.parent / n if n.startswith("csrc/") else (path.parent / n).resolve() for n in names
    }


@pytest.mark.parametrize("name", BELOW)
def test_a_cpu_room_includes_only_rooms_below_it(name: str) -> None:
    files = [path for path in (CSRC / "cpu" / name).iterdir() if path.suffix in (".h", ".cpp")]
    assert files
    upwards = {
        f"{path.name}: {other.name}"
        for path in files
        for other in included(path)
        if room(other) not in BELOW[name] | {name}
    }
    assert not upwards


def test_every_cpu_room_is_named() -> None:
    assert {path.name for path in (CSRC / "cpu").iterdir() if path.is_dir()} == set(BELOW)


@pytest.mark.parametrize(("name", "allowed"), [("base", {"base"}), ("ops", {"base", "ops"})])
def test_contracts_know_no_device(name: str, allowed: set[str]) -> None:
    files = [p for p in (CSRC if name == "base" else CSRC / name).iterdir() if p.suffix == ".h"]
    assert files
    assert {
        f"{p.name}: {o.name}" for p in files for o in included(p) if room(o) not in allowed
    } == set()
