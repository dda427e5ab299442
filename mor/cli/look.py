"""The command `mor look`."""

from pathlib import Path
from typing import Annotated

import typer

from mor.cli.shell import ModelFolder, hide_bars, one_sentence, text_of_argument

__all__ = ["look"]


def look(
    model: ModelFolder,
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
    with one_sentence():
        if (text is None) == (text_file is None):
            raise ValueError("expected a text or --text FILE, one of them")

        from mor.analysis.look import look_at
        from mor.data.text_files import read_text
        from mor.training.generate import load_model, trained_length

        hide_bars()
        passage = read_text(text_file) if text_file is not None else text_of_argument(text or "")
        language_model, tokenizer = load_model(model)
        window = trained_length(model)
        paths = look_at(language_model, tokenizer, passage, output_dir, max_tokens, window)
    for path in paths:
        typer.echo(str(path))
