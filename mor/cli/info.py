"""The command `mor info`."""

from typing import Annotated

import typer

from mor.cli.shell import one_sentence

__all__ = ["info"]


def info(
    systems: Annotated[
        bool,
        typer.Option("--systems", help="List the systems that mor implements, and their papers."),
    ] = False,
) -> None:
    """Show versions, instruction set and CUDA support: what a bug report needs."""
    if systems:
        from mor.catalogue import as_text

        typer.echo(as_text())
        return
    with one_sentence():
        from mor.info import describe

        lines = describe()
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
