"""Run an experiment of the paper: train its variants, write JSON, a figure and a page."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from benchmarks.reproduce.experiments import EXPERIMENTS
from benchmarks.reproduce.figures import draw
from benchmarks.reproduce.page import page, read_runs
from benchmarks.reproduce.presets import PRESETS
from benchmarks.reproduce.runs import run


def main(arguments: list[str] | None = None) -> None:
    """Trains, and writes the seed's JSON, the figure over all seeds in the folder, and its page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data's order")
    parser.add_argument("--budget", type=float, default=1.0, help="multiplies the training")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    given = parser.parse_args(arguments)
    if not given.budget > 0:
        parser.error(f"--budget must be positive, got {given.budget}")
    experiment, preset = EXPERIMENTS[given.experiment], PRESETS[given.preset]
    if given.budget != 1:
        preset = replace(
            preset,
            name=f"{preset.name}-x{given.budget:g}",
            tokens=preset.tokens * given.budget,
            flops=tuple(flops * given.budget for flops in preset.flops),
            published_steps={
                model: round(steps * given.budget)
                for model, steps in preset.published_steps.items()
            },
        )
    first = os.environ.get("RANK", "0") == "0"
    say = (lambda line: print(line, flush=True)) if first else (lambda line: None)
    values = run(experiment, preset, given.seed, given.output, say=say)
    if not first:
        return
    name = f"{experiment.name}-{preset.name}"
    (given.output / f"{name}-seed{given.seed}.json").write_text(json.dumps(values, indent=1) + "\n")
    runs = read_runs(given.output)
    draw(runs[experiment.name, preset.name], given.output / f"{name}.png")
    (given.output / "results.md").write_text(page(runs))
    say(f"Written: {given.output / name}-seed{given.seed}.json, {name}.png, results.md")


if __name__ == "__main__":
    main()
