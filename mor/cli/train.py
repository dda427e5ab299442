"""The command `mor train`: its own options, those of TrainingArguments, and a file of options."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mor.cli.shell import given_names, hide_bars, one_sentence, say, with_options_of
from mor.training.argument_names import OURS, argument_names, nearest
from mor.training.options import RunOptions
from mor.training.run_record import resumed_options

__all__ = ["TrainCommand", "train"]

_NAMED = "mor.training_arguments"  # where a call keeps them, by their names


class TrainCommand(TyperCommand):
    """Takes the fields of TrainingArguments beside the options that it shows.

    An option may be written as the field (`--learning_rate`, `--warmup-steps`) or as ours (`--lr`).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the fields away, and have the rest parsed."""
        ours = {flag for option in self.params for flag in (*option.opts, *option.secondary_opts)}
        words: list[str] = []
        named: dict[str, list[str]] = ctx.meta.setdefault(_NAMED, {})
        taking = words
        for word in args:
            if not word.startswith("--"):
                taking.append(word)
                continue
            typed, equals, value = word.partition("=")
            name = typed[2:].replace("-", "_")
            flag = "--" + OURS.get(name, name).replace("_", "-")
            if flag in ours:
                taking = words
                words.append(flag + equals + value)
            elif name.removeprefix("no_") in argument_names():
                taking = named[name] = [value] if equals else []  # the last one counts
            else:
                taking = words
                words.append(word)
        try:
            return super().parse_args(ctx, words)
        except Exception as error:
            # "No such option" names what may have been meant, of our options; here of the fields.
            if hasattr(error, "possibilities") and hasattr(error, "option_name"):
                fields = argument_names() - OURS.keys()
                close = difflib.get_close_matches(error.option_name[2:], fields, n=1)
                error.possibilities = [*(error.possibilities or []), *(f"--{n}" for n in close)]
            raise


def _read_options(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's options the defaults of the command line."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: expected options as NAME: VALUE, one a line")
    own = {option.name for option in ctx.command.params} - {"options_file", "help"}
    defaults: dict[str, str] = {}
    named: dict[str, Any] = {}
    for key, value in values.items():
        field = str(key).replace("-", "_")
        name = OURS.get(field, field)
        if name not in own and field not in argument_names():
            raise typer.BadParameter(f"{path}: there is no option {key!r}{nearest(field, own)}")
        if value is None:
            continue
        if name not in own:
            named[field] = value if isinstance(value, dict | list) else str(value)
        elif isinstance(value, dict):
            raise typer.BadParameter(f"{path}: expected one value of {key!r}, got {value}")
        else:
            defaults[name] = ",".join(map(str, value if isinstance(value, list) else [value]))
    ctx.default_map = defaults
    typed = ctx.meta.setdefault(_NAMED, {})
    ctx.meta[_NAMED] = named | typed
    return path


def _training_arguments(ctx: typer.Context) -> dict[str, Any]:
    """Fields of TrainingArguments that the command line and the file name."""
    values: dict[str, Any] = {}
    for name, words in ctx.meta[_NAMED].items():
        negated = name not in argument_names()
        value = words[0] if isinstance(words, list) and len(words) == 1 else words
        values[name.removeprefix("no_") if negated else name] = not negated if not words else value
    return values


@with_options_of(RunOptions)
def train(
    ctx: typer.Context,
    options_file: Annotated[
        Path | None,
        typer.Option(
            "--options",
            help="YAML file of options, NAME: VALUE; those typed here win. Each field of "
            "Transformers' TrainingArguments is an option too, as --warmup-steps or optim.",
            rich_help_panel="Run",
            is_eager=True,
            callback=_read_options,
        ),
    ] = None,
    **values: Any,
) -> None:
    """Train a Mixture-of-Recursions model."""
    given = given_names(ctx)
    options = RunOptions(**values, training_arguments=_training_arguments(ctx) or None)
    with one_sentence():
        if options.resume or options.resume_from is not None:
            options = resumed_options(options, given)
        options.check(given)
        say(f"Loading PyTorch, then {options.data or 'the text'} ...")

        from mor.training.run import prepare_run
        from mor.training.run import train as run_training

        hide_bars()
        trainer, checkpoint = prepare_run(options, given=given, say=say)
        if checkpoint is not None:
            say(f"Resuming from {checkpoint}")
        folder = run_training(trainer, checkpoint)
    prompt = "The" if options.data else "def main("  # the default text is Python's own sources
    say(f'Model saved in {folder}; try: mor generate {folder} "{prompt}"')
