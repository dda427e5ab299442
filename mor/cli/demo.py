"""The command `mor demo`."""

from pathlib import Path
from typing import Annotated

import typer

from mor.cli.shell import one_sentence, say

__all__ = ["demo"]


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    budget: Annotated[
        float,
        typer.Option(
            min=0, help="Training FLOPs as a multiple of the default (minutes on two cores)."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the order of the data.")] = 0,
) -> None:
    """Train MoR and a dense model on the same text with the same FLOPs, and compare them."""
    with one_sentence():
        output_dir.mkdir(parents=True, exist_ok=True)
        say("Loading PyTorch ...")

        from mor.training.demo import run_demo

        run_demo(output_dir, budget=budget, seed=seed)
