"""The `mor` command, which answers --help and misspelt options without loading PyTorch."""

from mor.cli.commands import app

__all__ = ["app"]
