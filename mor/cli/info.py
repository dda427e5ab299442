"""The command `mor info`."""

import typer

from mor.cli.shell import one_sentence

__all__ = ["info"]


def info() -> None:
    """Show versions, instruction set and CUDA support: what a bug report needs."""
    with one_sentence():
        from mor.info import describe

        lines = describe()
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
