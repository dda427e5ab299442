"""The commands: train, generate, look, convert, demo, info.

Over 300 lines in one file: most of them are the options and what they say of themselves.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mor.training.options import RoutingOptions, RunOptions
from mor.training.signals import Stopped, on_signal, stop

__all__ = ["app"]

app = typer.Typer(
    help="Mixture-of-Recursions: train, generate, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Model = Annotated[Path, typer.Argument(help="Folder of a saved model, of a run, a checkpoint.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
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


def _say(line: str) -> None:
    if _is_first_process():
        typer.echo(line)
        sys.stdout.flush()


def _hide_bars() -> None:
    """No progress bars of loading and saving into a log."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _given(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


def _with_options_of(kind: type[RoutingOptions]) -> Callable[[Callable[..., None]], Any]:
    """Gives a command `(ctx, ..., **options)` one parameter for each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    panels = ["Run", "Data", "Model", "Training"]
    ordered = sorted(
        fields(kind), key=lambda f: panels.index(hints[f.name].__metadata__[0].rich_help_panel)
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[:-1]
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in ordered
        ]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        return command

    return decorate


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mor {version('mor')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Mixture-of-Recursions: train, generate, look inside."""


@app.command()
@_with_options_of(RunOptions)
def train(ctx: typer.Context, **options: Any) -> None:
    """Train a Mixture-of-Recursions model."""
    given = _given(ctx)
    run, checkpoint = options["output_dir"], options["resume_from"]
    resumed = options["resume"] or checkpoint is not None
    with _one_sentence():
        if not resumed:
            RunOptions(**options).check(given)
        _say(f"Loading PyTorch, then {options['data'] or 'the text'} ...")

        from mor.training.run import options_of_run, prepare_run
        from mor.training.run import train as run_training

        _hide_bars()
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
        trainer, checkpoint = prepare_run(RunOptions(**options), given=given, say=_say)
        if checkpoint is not None:
            _say(f"Resuming from {checkpoint}")
        folder = run_training(trainer, checkpoint)
    prompt = "The" if options["data"] else "def main("  # the default text is Python's own sources
    _say(f'Model saved in {folder}; try: mor generate {folder} "{prompt}"')


@app.command()
def generate(
    model: _Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens kept; 0: all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Share of the probability kept, above 0 and at most 1.")
    ] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that were there less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a trained model; it appears as it is written."""
    with _one_sentence():
        if not 0 < top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
        if not repetition_penalty > 0:
            raise ValueError(f"--repetition-penalty must be above 0, got {repetition_penalty}")
        text = _text(prompt)

        from mor.training.generate import continue_text, load_model, trained_length

        _hide_bars()
        language_model, tokenizer = load_model(model)
        continue_text(
            language_model,
            tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            trained_length=trained_length(model),
            write=lambda part: typer.echo(part, nl=False),
        )
        typer.echo()


@app.command()
def look(
    model: _Model,
    text: Annotated[
        str | None, typer.Argument(help="Text to look at; - reads standard input.")
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option("--text", help="File with the text, instead.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for page and pictures.")] = Path(
        "runs/look"
    ),
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to look at, at most.")] = 2000,
) -> None:
    """Show how deep a model goes for each token of a text: a page and three pictures."""
    with _one_sentence():
        if (text is None) == (text_file is None):
            raise ValueError("expected a text or --text FILE, one of them")

        from mor.analysis.look import look_at
        from mor.data.text_files import read_text
        from mor.training.generate import load_model, trained_length

        _hide_bars()
        passage = read_text(text_file) if text_file is not None else _text(text or "")
        language_model, tokenizer = load_model(model)
        window = trained_length(model)
        paths = look_at(language_model, tokenizer, passage, output_dir, max_tokens, window)
    for path in paths:
        typer.echo(str(path))


@app.command()
@_with_options_of(RoutingOptions)
def convert(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="A dense model: a folder in Transformers' format, a GGUF file, or a name on the "
            "Hugging Face hub; or a folder that the authors' code saved."
        ),
    ],
    output_dir: Annotated[Path, typer.Argument(help="New folder for the MoR model.")],
    layers: Annotated[
        int | None,
        typer.Option(help="Layers at full depth (unrolled). Default: the dense model's."),
    ] = None,
    init: Annotated[
        str, typer.Option(help="Layers to start from: stepwise, average, lower, upper, random.")
    ] = "stepwise",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16, float64.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the routers and of --init random.")] = 0,
    authors_config: Annotated[
        Path | None,
        typer.Option(help="YAML file of a model of the authors. Default: the one in its folder."),
    ] = None,
    **options: Any,
) -> None:
    """Convert a dense checkpoint, with its tokenizer, to a Mixture-of-Recursions one."""
    depth: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    with _one_sentence():
        from mor.models.authors_options import is_authors_checkpoint

        from_authors = authors_config is not None or is_authors_checkpoint(Path(source))
        of_dense = _given(ctx) - {"source", "output_dir", "dtype", "authors_config"}
        if from_authors and of_dense:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(of_dense))
            raise ValueError(f"a model of the authors has its own options: leave out {names}")
        routing = RoutingOptions(**options)
        routing.check(_given(ctx))
        chosen = routing.for_config()

        from transformers.utils.logging import disable_progress_bar

        from mor.training.convert import convert_checkpoint

        disable_progress_bar()
        model = convert_checkpoint(
            source,
            output_dir,
            init=init,
            seed=seed,
            dtype=dtype,
            authors_config=authors_config,
            **chosen,
            **depth,
        )
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    typer.echo(f"Model of {millions:.1f}M parameters saved in {output_dir}.")
    if from_authors:
        if any(output_dir.glob("tokenizer*")):
            typer.echo(f'Try: mor generate {output_dir} "The"')
        else:
            typer.echo(f"Before mor generate {output_dir} TEXT, save its tokenizer there.")
        return
    if model.config.router == "expert" and model.config.router_gating == "weighted":
        typer.echo(
            "Weighted gating starts far from the dense model (SmolLM2-135M: perplexity 6e12, with "
            "--gating residual 9e4): it needs long training."
        )
    run = Path("runs") / output_dir.resolve().name
    has_tokenizer = any(output_dir.glob("tokenizer*"))
    tokenizer = "" if has_tokenizer else " --tokenizer NAME"
    typer.echo(
        f"It needs training: mor train --model {output_dir}{tokenizer} --data TEXT --output-dir "
        f"{run}"
    )


@app.command()
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
    with _one_sentence():
        output_dir.mkdir(parents=True, exist_ok=True)
        _say("Loading PyTorch ...")

        from mor.training.demo import run_demo

        run_demo(output_dir, budget=budget, seed=seed)


@app.command()
def info() -> None:
    """Show versions, instruction set and CUDA support: what a bug report needs."""
    with _one_sentence():
        from mor.info import describe

        lines = describe()
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")


def _text(argument: str) -> str:
    """The argument, or for - what comes on standard input, without the last line's end."""
    return sys.stdin.read().removesuffix("\n") if argument == "-" else argument
