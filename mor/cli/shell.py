"""Code that the commands share: errors as one sentence, signals, options made of a dataclass."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mor.training.options import RoutingOptions
from mor.training.signals import Stopped, on_signal, stop

__all__ = [
    "ModelFolder",
    "given_names",
    "hide_bars",
    "one_sentence",
    "say",
    "text_of_argument",
    "with_options_of",
]

ModelFolder = Annotated[
    Path, typer.Argument(help="Folder of a saved model, of a run, a checkpoint.")
]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns an error in what the user gave into one sentence and exit code 2.

    A signal gives 128 and its number.
    With MOR_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    try:
        with on_signal(stop):
            yield
    except Stopped as stopped:
        if _is_first_process():
            typer.echo(f"mor: {str(stopped) or 'stopped'}", err=True)
        raise typer.Exit(128 + stopped.number) from None
    except BrokenPipeError:  # the reader has enough, as `head` has; Typer ends quietly
        raise
    except Exception as error:
        if os.environ.get("MOR_TRACEBACK") or not _is_users(error):
            raise
        typer.echo(f"mor: {' '.join(_sentence(error).split())}", err=True)
        raise typer.Exit(2) from None


def _is_users(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError

    kinds = (ValueError, OSError, ImportError, FloatingPointError, StrictDataclassError)
    return isinstance(error, kinds)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot read or write {error.filename}: {error.strerror}"
    return str(error)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's


def say(line: str) -> None:
    """Prints a line at once, in the first of several processes."""
    if _is_first_process():
        typer.echo(line)
        sys.stdout.flush()


def hide_bars() -> None:
    """No progress bars of loading and saving into a log."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def given_names(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


def with_options_of(kind: type[RoutingOptions]) -> Callable[[Callable[..., None]], Any]:
    """Gives a command `(ctx, ..., **options)` one parameter for each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    shown = {
        field: hints[field.name].__metadata__[0]
        for field in fields(kind)
        if hasattr(hints[field.name], "__metadata__")
    }
    panels = ["Run", "Data", "Model", "Training"]
    ordered = sorted(shown, key=lambda field: panels.index(shown[field].panel))

    def annotation(field: Field[Any]) -> Any:
        of = shown[field]
        names = [of.flags] if of.flags else []
        option = typer.Option(*names, help=of.help, rich_help_panel=of.panel)
        return Annotated[hints[field.name].__origin__, option]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[:-1]
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=annotation(field),
            )
            for field in ordered
        ]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        return command

    return decorate


def text_of_argument(argument: str) -> str:
    """The argument, or for - what comes on standard input, without the last line's end."""
    return sys.stdin.read().removesuffix("\n") if argument == "-" else argument
