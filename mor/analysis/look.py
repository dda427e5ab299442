"""Depth of each token of a text, as a page and pictures: the work of `mor look`."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mor.analysis.depth_page import depth_page, token_pieces
from mor.analysis.plots import plot_depth_by_position, plot_router_scores, plot_text_by_depth
from mor.data.corpus import clean_text
from mor.models import MoRForCausalLM

__all__ = ["look_at"]

_INTRO = (
    "The router decided how often the shared block was applied to each token, without looking at "
    "later tokens."
)


@torch.no_grad()
def look_at(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    output_dir: str | Path,
    max_tokens: int = 2000,
    window: int | None = None,
    intro: str = _INTRO,
) -> list[Path]:
    """Routes a text and writes `depth.html`, `depth.png`, `positions.png` and `scores.png`.

    Args:
        model: a `MoRForCausalLM` with a router, or a swapped model, for evaluation.
        tokenizer: the model's.
        text: what to look at.
        output_dir: folder for the files, made if it is not there.
        max_tokens: tokens of the text to look at, at most.
        window: tokens to route at once, as many as in a row of the training; default as many as
            the model has positions for.
        intro: a sentence for the page.

    Returns:
        The files.

    Raises:
        ValueError: no text, or a model without a router.
    """
    routed = isinstance(model, MoRForCausalLM) and model.config.router is not None
    if not routed and not getattr(model.config, "mor_swap", None):
        kind = "one without" if isinstance(model, MoRForCausalLM) else f"a {type(model).__name__}"
        raise ValueError(f"look: expected a MoR model with a router, got {kind}")
    ids, pieces = _tokens(tokenizer, clean_text(text), max_tokens)
    if not ids:
        raise ValueError("look: expected a text, got an empty one")
    window = min(len(ids), window or model.config.max_position_embeddings)
    depths, routings, rows = [], [], []
    for window_ids in torch.tensor([ids], device=model.device).split(window, dim=1):
        output = model(window_ids)
        row = output.token_depths
        rows.append(torch.nn.functional.pad(row, (0, window - row.shape[1])))
        depths += row[0].tolist()
        routings.append(output.routing)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture, positions, scores = (
        folder / name for name in ("depth.html", "depth.png", "positions.png", "scores.png")
    )
    page.write_text(depth_page(pieces, depths, intro=intro), encoding="utf-8")
    plot_text_by_depth(pieces, depths, picture)
    plot_depth_by_position(torch.cat(rows), positions)
    plot_router_scores(routings, scores)
    return [page, picture, positions, scores]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int
) -> tuple[list[int], list[str]]:
    """The tokens and what each of them stands for in the text."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"][:max_tokens]
        return ids, token_pieces(text, encoded["offset_mapping"][: len(ids)])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    return ids, [tokenizer.decode([token]) for token in ids]
