"""The `mor` command: train, generate, convert, demo, info."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from huggingface_hub.errors import StrictDataclassError

from mor.options import RunOptions

__all__ = ["app"]

app = typer.Typer(
    help="Mixture-of-Recursions: train, generate, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns an error in what the user gave into one sentence and exit code 2.

    With MOR_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        if os.environ.get("MOR_TRACEBACK"):
            raise
        typer.echo(f"mor: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _is_default(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def _refuse_options_of_dense_models(ctx: typer.Context) -> None:
    allowed = ("source", "output_dir", "dtype", "authors_config")
    given = [name for name in ctx.params if name not in allowed and not _is_default(ctx, name)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"a model of the authors has its own options: leave out {names}")


def _options_as_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `(ctx, **options)` one parameter for each field of RunOptions."""
    hints = get_type_hints(RunOptions, include_extras=True)
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    ]
    parameters += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(RunOptions)
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_options_as_parameters
def train(ctx: typer.Context, **options: Any) -> None:
    """Train a Mixture-of-Recursions model."""
    from mor.run import options_of_run, prepare_run
    from mor.run import train as run_training

    with _one_sentence():
        run, checkpoint = options["output_dir"], options["resume_from"]
        if options["resume"] or checkpoint is not None:
            stored = options_of_run(run) or (
                options_of_run(checkpoint.parent) if checkpoint else {}
            )
            before = {
                name: Path(value) if isinstance(options[name], Path) else value
                for name, value in stored.items()
                if _is_default(ctx, name)
            }
            options = {**options, **before}
        trainer, checkpoint = prepare_run(RunOptions(**options))
    if checkpoint is not None:
        typer.echo(f"Resuming from {checkpoint}")
    folder = run_training(trainer, checkpoint)
    prompt = "The" if options["data"] else "def main("  # the default text is Python's own sources
    typer.echo(f'Model saved in {folder}; try: mor generate {folder} "{prompt}"')


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model, or of a run.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the probability kept.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    from mor.generate import continue_text, load_model

    with _one_sentence():
        language_model, tokenizer = load_model(model)
    typer.echo(
        continue_text(
            language_model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    )


@app.command()
def convert(
    ctx: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a dense model in Transformers' format, or of a model that the authors' "
            "code saved, or a GGUF file."
        ),
    ],
    output_dir: Annotated[Path, typer.Argument(help="Folder for the MoR model.")],
    num_recursions: Annotated[int, typer.Option(help="Times the shared block is applied.")] = 3,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers at full depth (unrolled). Default: the dense model's."),
    ] = None,
    sharing: Annotated[str, typer.Option(help="Which layers are shared.")] = "middle_cycle",
    router: Annotated[
        Literal["expert", "token", "none"],
        typer.Option(help="Who chooses: experts choose tokens or tokens their depth."),
    ] = "expert",
    capacities: Annotated[
        str | None,
        typer.Option(help="Expert routing: share of the tokens of each recursion, e.g. 1,2/3,1/3."),
    ] = None,
    router_type: Annotated[
        str, typer.Option(help="The router network: linear, mlp, wide_mlp, random.")
    ] = "linear",
    gating: Annotated[
        str, typer.Option(help="weighted (the paper's), additive, or residual (starts nearest).")
    ] = "weighted",
    kv_strategy: Annotated[
        str, typer.Option(help="Which keys and values a recursion sees.")
    ] = "recursion",
    init: Annotated[
        str, typer.Option(help="Layers to start from: stepwise, average, lower, upper, random.")
    ] = "stepwise",
    relaxation: Annotated[
        Literal["lora", "dora", "none"],
        typer.Option(help="Adapters of each recursion's own, started by a truncated SVD."),
    ] = "none",
    relaxation_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    recursion_encoding: Annotated[
        bool, typer.Option("--recursion-encoding", help="A learnt vector of each recursion's own.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16, float64.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the routers and of --init random.")] = 0,
    authors_config: Annotated[
        Path | None,
        typer.Option(help="YAML file of a model of the authors. Default: the one in its folder."),
    ] = None,
) -> None:
    """Convert a dense checkpoint, with its tokenizer, to a Mixture-of-Recursions one."""
    from transformers.utils.logging import disable_progress_bar

    from mor.convert import convert_checkpoint
    from mor.models.authors_options import is_authors_checkpoint
    from mor.run import parse_capacities

    disable_progress_bar()
    authors = authors_config is not None or is_authors_checkpoint(source)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    with _one_sentence():
        if authors:
            _refuse_options_of_dense_models(ctx)
        model = convert_checkpoint(
            source,
            output_dir,
            init=init,
            seed=seed,
            dtype=dtype,
            authors_config=authors_config,
            num_recursions=num_recursions,
            sharing=sharing,
            router=None if router == "none" else router,
            capacities=parse_capacities(capacities),
            router_type=router_type,
            router_gating=gating,
            kv_strategy=kv_strategy,
            relaxation=None if relaxation == "none" else relaxation,
            relaxation_rank=relaxation_rank,
            recursion_encoding=recursion_encoding,
            **depth,
        )
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    next_step = "" if authors else "; it needs training"
    typer.echo(f"Model of {millions:.1f}M parameters saved in {output_dir}{next_step}")


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
    from mor.demo import run_demo

    with _one_sentence():
        output_dir.mkdir(parents=True, exist_ok=True)
    run_demo(output_dir, budget=budget, seed=seed)


@app.command()
def info() -> None:
    """Show versions, instruction set and CUDA support: what a bug report needs."""
    from mor.info import describe

    with _one_sentence():
        lines = describe()
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
