"""A text as an HTML page in which each token's colour is its recursion depth."""

import html
from collections.abc import Sequence

__all__ = ["COLOURS", "check_depths", "depth_page", "token_pieces"]

# Light to dark in one hue (ColorBrewer "YlGnBu", safe for colour-blind readers), each with the text
# colour that has a contrast of at least 7:1 on it. The bar below a token repeats the depth for
# readers who see no colour.
COLOURS = (
    ("#ffffff", "#000000"),
    ("#ffffcc", "#000000"),
    ("#a1dab4", "#000000"),
    ("#41b6c4", "#000000"),
    ("#1d4f91", "#ffffff"),
    ("#081d58", "#ffffff"),
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #000; background: #fff; }}
pre {{ font: 14px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
.t {{ border-bottom: solid #555; border-radius: 2px; }}
.l {{ padding: 0 .5em; margin-right: 1em; }}
{styles}
</style>
</head>
<body>
<h1>{title}</h1>
{intro}<p>Recursions: {legend}</p>
<pre>{body}</pre>
</body>
</html>
"""


def token_pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Cuts a text into one piece for each token; the pieces join to the text again.

    Args:
        text: what was tokenised.
        offsets: start and end character of each token, as a fast tokenizer's
            `return_offsets_mapping` gives them. Tokens that share a character (a byte-level
            tokenizer splits some) give it to the first.

    Example:
        >>> token_pieces("a b", [(0, 1), (1, 3)])
        ['a', ' b']
    """
    pieces = []
    done = 0
    for _, end in offsets:
        pieces.append(text[done:end])
        done = max(done, end)
    return pieces


def depth_page(
    pieces: Sequence[str],
    depths: Sequence[int],
    *,
    title: str = "Recursion depth of each token",
    intro: str = "",
) -> str:
    """Makes a self-contained HTML page in which each token's colour is its recursion depth.

    Args:
        pieces: the text of each token.
        depths: how many recursions each token took, at most 5.
        title: heading.
        intro: a sentence above the text.

    Returns:
        The page. It loads nothing, runs no script, and shows any text as text.

    Raises:
        ValueError: not one depth for each piece, or a depth outside [0, 5].
    """
    check_depths(pieces, depths)
    deepest = max(depths, default=0)
    styles = "\n".join(
        f".d{depth} {{ background: {back}; color: {fore}; border-bottom-width: {depth}px; }}"
        for depth, (back, fore) in enumerate(COLOURS[: deepest + 1])
    )
    total = max(1, len(depths))
    shares = [100 * list(depths).count(depth) / total for depth in range(deepest + 1)]
    legend = "".join(
        f'<span class="t l d{depth}">{depth} ({shares[depth]:.0f}%)</span>'
        for depth in range(min(depths, default=0), deepest + 1)
    )
    body = "".join(
        f'<span class="t d{depth}" title="{depth}">{html.escape(piece)}</span>'
        for piece, depth in zip(pieces, depths, strict=True)
        if piece
    )
    return _PAGE.format(
        title=html.escape(title),
        intro=f"<p>{html.escape(intro)}</p>\n" if intro else "",
        styles=styles,
        legend=legend,
        body=body,
    )


def check_depths(pieces: Sequence[str], depths: Sequence[int]) -> None:
    """Refuses depths that do not fit the pieces or have no colour."""
    if len(pieces) != len(depths):
        raise ValueError(f"expected one depth for each of {len(pieces)} tokens, got {len(depths)}")
    wrong = [depth for depth in depths if not 0 <= depth < len(COLOURS)]
    if wrong:
        raise ValueError(f"expected depths from 0 to {len(COLOURS) - 1}, got {wrong[0]}")
