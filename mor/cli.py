"""The `mor` command's Typer application, for tests and for scripts that extend it."""

from mor_cli.commands import app

__all__ = ["app"]
