"""The JSON files of runs."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduce.intervals import Interval, interval

__all__ = ["Run", "interval_of", "names_of", "read_runs", "value_of"]

#: What one file holds: "settings", "machine", and "results" of the variants.
Run = Mapping[str, Any]


def read_runs(folder: Path) -> dict[tuple[str, str], list[Run]]:
    """Reads the JSON files of a folder, by experiment and preset, each in the order of seeds."""
    runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        values = json.loads(path.read_text())
        runs[values["settings"]["experiment"], values["settings"]["name"]].append(values)
    for seeds in runs.values():
        seeds.sort(key=lambda one: one["settings"]["seed"])
    return dict(runs)


def names_of(result: Mapping[str, Any]) -> set[str]:
    """The numbers of a variant."""
    return {*result, *result["measured"]}


def value_of(run: Run, variant: str, key: str) -> float:
    """A number of a variant, of its result or measured afterwards."""
    result = next(result for result in run["results"] if result["name"] == variant)
    return float(result["measured"][key] if key in result["measured"] else result[key])


def interval_of(runs: Sequence[Run], variant: str, key: str) -> Interval:
    """The mean of that number over the seeds."""
    return interval([value_of(run, variant, key) for run in runs])
