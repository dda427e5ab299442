"""docs/results.md from the JSON files: `python -m benchmarks.reproduce.page`."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduce.design import LOSS, Claim, Experiment
from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.intervals import interval, verdict

__all__ = ["PAGE", "RESULTS", "page", "read_runs", "value_of"]

ROOT = Path(__file__).parents[2]
#: The JSON files of the runs that the page shows.
RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
PAGE = ROOT / "docs" / "results.md"

Run = Mapping[str, Any]

_INTRO = """# Results

The paper's experiments, run again by `python -m benchmarks.reproduce`
([how](training.md#the-papers-experiments)). A script writes this page from the JSON files in
`benchmarks/results/reproduce/`: `python -m benchmarks.reproduce.page`.

Losses are of held-out text, in nats per token, with causal routing; the mean over the seeds stands
with its 95% confidence interval (Student's t). A claim is *reproduced* or *contradicted* if the
interval of the difference, taken seed by seed, excludes zero with at least three seeds; else the
verdict is *not at this size*. Preset `tiny` trains models of at most two million parameters for
minutes: it tests directions, and none of the paper's numbers.
"""


def read_runs(folder: Path) -> dict[tuple[str, str], list[Run]]:
    """Reads the JSON files of a folder, by experiment and preset, each in the order of seeds."""
    runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        values = json.loads(path.read_text())
        runs[values["settings"]["experiment"], values["settings"]["name"]].append(values)
    for seeds in runs.values():
        seeds.sort(key=lambda one: one["settings"]["seed"])
    return dict(runs)


def value_of(run: Run, variant: str, key: str) -> float:
    """A number of a variant, of its result or measured afterwards."""
    result = next(result for result in run["results"] if result["name"] == variant)
    return float(result["measured"][key] if key in result["measured"] else result[key])


def page(runs: Mapping[tuple[str, str], Sequence[Run]]) -> str:
    """The whole page as Markdown."""
    parts = [_INTRO]
    for experiment in EXPERIMENTS.values():
        shown = [preset for name, preset in sorted(runs) if name == experiment.name]
        if not shown:
            continue
        parts.append(f"## {experiment.title}\n\n{experiment.about}\n")
        parts += [_section(experiment, runs[experiment.name, preset]) for preset in shown]
    return "\n".join(parts)


def _section(experiment: Experiment, runs: Sequence[Run]) -> str:
    settings, first = runs[0]["settings"], runs[0]["results"]
    seeds = ", ".join(str(run["settings"]["seed"]) for run in runs)
    machine = runs[0]["machine"]
    measured = list(dict.fromkeys(key for result in first for key in result["measured"]))
    head = ["variant", "parameters", "training tokens", "training FLOPs", "seconds", "loss"]
    rows = []
    for result in first:
        name = result["name"]
        rows.append(
            [
                name,
                f"{result['parameters'] / 1e6:.2f} M",
                f"{result['train_tokens'] / 1e3:.0f} k",
                f"{result['train_flops']:.3g}",
                f"{_mean(runs, name, 'train_seconds'):.0f}",
                str(interval([value_of(run, name, LOSS) for run in runs])),
                *(
                    str(interval([value_of(run, name, key) for run in runs]))
                    if key in result["measured"]
                    else ""
                    for key in measured
                ),
            ]
        )
    command = f"python -m benchmarks.reproduce {experiment.name} --preset {settings['name']}"
    lines = [
        f"### Preset `{settings['name']}`, seeds {seeds}",
        "",
        f"`{command}`, {machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch "
        f"{machine['torch']}; `{experiment.name}-{settings['name']}-seed*.json`.",
        "",
        *_table([*head, *measured], rows),
        "",
    ]
    known = {result["name"] for result in first}
    claims = [c for c in experiment.claims if c.lower[0] in known and c.higher[0] in known]
    if claims:
        found = [[claim.text, *_judged(claim, runs)] for claim in claims]
        lines += [*_table(["claim", "difference", "verdict"], found), ""]
    return "\n".join(lines)


def _judged(claim: Claim, runs: Sequence[Run]) -> tuple[str, str]:
    differences = [
        claim.difference(value_of(run, *claim.lower), value_of(run, *claim.higher)) for run in runs
    ]
    unit = 100 if claim.relative else 1
    found = str(interval([unit * difference for difference in differences]))
    return found + " %" * claim.relative, verdict(differences)


def _mean(runs: Sequence[Run], variant: str, key: str) -> float:
    return interval([value_of(run, variant, key) for run in runs]).mean


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


if __name__ == "__main__":
    PAGE.write_text(page(read_runs(RESULTS)))
