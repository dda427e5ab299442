"""Draws the pictures of docs/pictures/ that explain recursion, KV strategies and depth-wise passes.

    python tools/concept_drawings.py           # rewrite docs/pictures/*.svg
    python tools/concept_drawings.py --to DIR  # write them elsewhere

Every picture shows the same eight tokens, so that the pictures can be read side by side.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
DEPTHS = (3, 1, 2, 3, 1, 2, 3, 1)  # recursions of each token
STEPS = max(DEPTHS)
COLOURS = ("#9ecae1", "#4292c6", "#08519c")  # of recursion steps 1, 2 and 3
OWN = "#d9d9d9"  # layers that are not shared


def recursion(axes: Axes) -> None:
    """The path of each token through the first layer, the shared block and the last layer."""
    rows = ["first layer", *(f"shared block, step {r + 1}" for r in range(STEPS)), "last layer"]
    for row, name in enumerate(rows):
        axes.text(-0.7, row, name, ha="right", va="center")
        for token, depth in enumerate(DEPTHS):
            shared = 1 <= row <= STEPS
            if shared and row > depth:
                axes.plot([token, token], [row - 0.5, row + 0.5], color="black", lw=0.8, ls=":")
            else:
                _cell(axes, token, row, COLOURS[row - 1] if shared else OWN)
    axes.text(3.5, STEPS + 1.9, "A dotted token has exited and waits unchanged.", ha="center")
    _tokens(axes, -0.8)
    axes.set(xlim=(-4.2, 8), ylim=(STEPS + 2.3, -1.3))


def kv_strategy(key_step: Callable[[int, int], int | None]) -> Callable[[Axes], None]:
    """The keys that each recursion step attends to, and where it has queries.

    Args:
        key_step: the step that computed the key of a token of the given depth which the given step
            sees, both counted from 1; None if it sees no key of this token.
    """

    def draw(axes: Axes) -> None:
        for step in range(1, STEPS + 1):
            axes.text(-0.7, step, f"step {step} attends to", ha="right", va="center")
            for token, depth in enumerate(DEPTHS):
                source = key_step(depth, step)
                _cell(axes, token, step, "white" if source is None else COLOURS[source - 1])
                if depth >= step:
                    axes.plot(token, step, marker="o", color="black", ms=5)
        for step, colour in enumerate(COLOURS):
            _cell(axes, 2.4 * step - 2.5, STEPS + 1.2, colour)
            axes.text(2.4 * step - 2, STEPS + 1.2, f"key of step {step + 1}", va="center")
        axes.plot(5, STEPS + 1.2, marker="o", color="black", ms=5)
        axes.text(5.3, STEPS + 1.2, "query at this step", va="center")
        _tokens(axes, 0.2)
        axes.set(xlim=(-3.6, 8.2), ylim=(STEPS + 1.9, -0.3))

    return draw


def depth_wise_pass(axes: Axes) -> None:
    """One pass of the shared block over rows of several requests at different steps."""
    rows = (
        ("A, decoding", 1, 1),
        ("B, decoding", 3, 3),
        ("C, decoding", 2, 3),
        ("D, prompt", 1, 2),
    )
    axes.add_patch(Rectangle((2.6, -0.6), 2, 4.2, facecolor=OWN, edgecolor="black"))
    axes.text(3.6, 1.5, "one pass of\nthe shared\nblock", ha="center", va="center")
    for row, (request, step, depth) in enumerate(rows):
        axes.text(-0.7, row, f"request {request}", ha="right", va="center")
        _cell(axes, 0, row, COLOURS[step - 1])
        axes.text(0.6, row, f"step {step}", va="center")
        _arrow(axes, 1.6, 2.5, row)
        _arrow(axes, 4.7, 5.6, row)
        ends = step == depth
        after = (
            "exits: last layer, then a new token" if ends else f"step {step + 1} in the next pass"
        )
        _cell(axes, 6.1, row, OWN if ends else COLOURS[step])
        axes.text(6.7, row, after, va="center")
    axes.set(xlim=(-3.6, 12.2), ylim=(4, -1))


DRAWINGS: dict[str, Callable[[Axes], None]] = {
    "recursion": recursion,
    "kv_recursion": kv_strategy(lambda depth, step: step if depth >= step else None),
    "kv_shared": kv_strategy(lambda depth, step: 1),
    "kv_hybrid": kv_strategy(min),
    "depth_wise_pass": depth_wise_pass,
}


def _cell(axes: Axes, x: float, y: float, colour: str) -> None:
    axes.add_patch(Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, facecolor=colour, edgecolor="black"))


def _arrow(axes: Axes, start: float, end: float, y: float) -> None:
    axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="->", mutation_scale=12))


def _tokens(axes: Axes, y: float) -> None:
    for token in range(len(DEPTHS)):
        axes.text(token, y, f"t{token + 1}", ha="center", va="center")


def write(folder: Path) -> list[Path]:
    """Writes every drawing as folder/NAME.svg; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Text stays text, which a reader can select and search.
    with matplotlib.rc_context({"svg.hashsalt": "mor", "svg.fonttype": "none"}):
        for name, draw in DRAWINGS.items():
            figure = Figure(figsize=(8, 3.6), layout="constrained")
            axes = figure.subplots()
            axes.set_axis_off()
            draw(axes)
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None})
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="DIR")
    for path in write(parser.parse_args().to):
        print(path)
