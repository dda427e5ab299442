"""The command `mor generate`."""

from typing import Annotated

import typer

from mor.cli.shell import ModelFolder, hide_bars, one_sentence, text_of_argument

__all__ = ["generate"]


def generate(
    model: ModelFolder,
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
    with one_sentence():
        if not 0 < top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
        if not repetition_penalty > 0:
            raise ValueError(f"--repetition-penalty must be above 0, got {repetition_penalty}")
        text = text_of_argument(prompt)

        from mor.training.generate import continue_text, load_model, trained_length

        hide_bars()
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
