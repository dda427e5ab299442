"""The `mor` command, which answers --help and misspelt options without loading PyTorch."""

from importlib.metadata import version
from typing import Annotated

import typer

from mor.cli import analyze, convert, demo, generate, info, look, serve, train

__all__ = ["app"]

app = typer.Typer(
    help="Mixture-of-Recursions: train, generate, serve, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """Mixture-of-Recursions: train, generate, serve, look inside."""


app.command(cls=train.TrainCommand)(train.train)
for _command in (
    generate.generate,
    serve.serve,
    look.look,
    analyze.analyze,
    convert.convert,
    demo.demo,
    info.info,
):
    app.command()(_command)
