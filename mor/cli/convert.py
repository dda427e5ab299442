"""The command `mor convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mor.cli.shell import given_names, one_sentence, with_options_of
from mor.training.options import RoutingOptions

__all__ = ["convert"]


@with_options_of(RoutingOptions)
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
    with one_sentence():
        from mor.models.authors_options import is_authors_checkpoint

        from_authors = authors_config is not None or is_authors_checkpoint(Path(source))
        of_dense = given_names(ctx) - {"source", "output_dir", "dtype", "authors_config"}
        if from_authors and of_dense:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(of_dense))
            raise ValueError(f"a model of the authors has its own options: leave out {names}")
        routing = RoutingOptions(**options)
        routing.check(given_names(ctx))
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
