"""Run experiments of the paper: train their variants, write JSON, a figure and a page."""

import argparse
import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.figures import draw
from benchmarks.reproduce.page import page
from benchmarks.reproduce.presets import PRESETS
from benchmarks.reproduce.records import read_runs
from benchmarks.reproduce.runs import run


def main(arguments: list[str] | None = None) -> None:
    """Trains, and writes the seed's JSON, the figure over all seeds in the folder, and its page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("experiments", choices=EXPERIMENTS, nargs="+", metavar="EXPERIMENT")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of the weights and the data's order"
    )
    parser.add_argument("--budget", type=float, default=1.0, help="multiplies the training")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    given = parser.parse_args(arguments)
    if not given.budget > 0:
        parser.error(f"--budget must be positive, got {given.budget}")
    preset = PRESETS[given.preset]
    if given.budget != 1:
        preset = replace(
            preset,
            name=f"{preset.name}-x{given.budget:g}",
            tokens=preset.tokens * given.budget,
            flops=tuple(flops * given.budget for flops in preset.flops),
        )
    first = os.environ.get("RANK", "0") == "0"
    say = (lambda line: print(line, flush=True)) if first else (lambda line: None)
    for experiment, seed in product(given.experiments, given.seed):
        values = run(EXPERIMENTS[experiment], preset, seed, given.output, say=say)
        if not first:
            continue
        name = f"{experiment}-{preset.name}"
        path = given.output / f"{name}-seed{seed}.json"
        path.write_text(json.dumps(values, indent=1) + "\n")
        runs = read_runs(given.output)
        draw(runs[experiment, preset.name], given.output / f"{name}.svg")
        (given.output / "results.md").write_text(page(runs))
        say(f"Written: {path}, {name}.svg, results.md")


if __name__ == "__main__":
    main()
