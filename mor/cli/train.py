"""The command `mor train`."""

from pathlib import Path
from typing import Any

import typer

from mor.cli.shell import given_names, hide_bars, one_sentence, say, with_options_of
from mor.training.options import RunOptions

__all__ = ["train"]


@with_options_of(RunOptions)
def train(ctx: typer.Context, **options: Any) -> None:
    """Train a Mixture-of-Recursions model."""
    given = given_names(ctx)
    run, checkpoint = options["output_dir"], options["resume_from"]
    resumed = options["resume"] or checkpoint is not None
    with one_sentence():
        if not resumed:
            RunOptions(**options).check(given)
        say(f"Loading PyTorch, then {options['data'] or 'the text'} ...")

        from mor.training.run import options_of_run, prepare_run
        from mor.training.run import train as run_training

        hide_bars()
        if resumed:
            paths = ("output_dir", "model", "config", "resume_from")
            stored = options_of_run(run) or (
                options_of_run(checkpoint.parent) if checkpoint else {}
            )
            options |= {
                name: Path(value) if name in paths and value is not None else value
                for name, value in stored.items()
                if name in options and name not in given
            }
        trainer, checkpoint = prepare_run(RunOptions(**options), given=given, say=say)
        if checkpoint is not None:
            say(f"Resuming from {checkpoint}")
        folder = run_training(trainer, checkpoint)
    prompt = "The" if options["data"] else "def main("  # the default text is Python's own sources
    say(f'Model saved in {folder}; try: mor generate {folder} "{prompt}"')
