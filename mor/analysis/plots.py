"""Pictures of recursion: text by depth, depth by position, router scores, loss by FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from torch import Tensor

from mor._extras import extra
from mor.analysis.depth_page import COLOURS, check_depths, depth_page, token_pieces

if TYPE_CHECKING:
    from mor.modules import RecursionOutput

__all__ = [
    "depth_page",
    "plot_depth_by_position",
    "plot_loss_against_cost",
    "plot_loss_against_flops",
    "plot_router_scores",
    "plot_text_by_depth",
    "router_scores",
    "token_pieces",
]


_DPI = 150


def plot_text_by_depth(
    pieces: Sequence[str], depths: Sequence[int], path: str | Path, *, columns: int = 80
) -> None:
    """Draws a text in which each token's colour is its recursion depth: `depth_page` for a paper.

    Args:
        pieces: the text of each token.
        depths: how many recursions each token took, at most 5.
        path: the file; its ending chooses the format.
        columns: characters in a line; longer lines are broken, between any two characters.

    Raises:
        ValueError: not one depth for each piece, a depth outside [0, 5], no column.
    """
    with extra("plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
        from matplotlib.patches import Patch, Rectangle

    check_depths(pieces, depths)
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    boxes, rows = _text_boxes(pieces, depths, columns)
    # A column is as wide as a character is drawn, so that a word of several tokens has no gaps.
    font = FontProperties(family="DejaVu Sans Mono", size=9)
    figure = Figure(dpi=_DPI)
    drawn = FigureCanvasAgg(figure).get_renderer().get_text_width_height_descent
    width, height = columns * drawn("m" * 100, font, False)[0] / 100 / _DPI, 0.24 * rows
    margin, legend = 0.05, 0.5
    size = max(4.0, width + 2 * margin), height + legend + 2 * margin
    figure.set_size_inches(size)
    place = margin / size[0], (legend + margin) / size[1], width / size[0], height / size[1]
    axes = figure.add_axes(place)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    for row, column, text, depth in boxes:
        back, fore = COLOURS[depth]
        axes.add_patch(Rectangle((column, row + 0.08), len(text), 0.84, facecolor=back))
        axes.text(
            column, row + 0.5, text, color=fore, fontproperties=font, va="center",
            parse_math=False,
        )  # fmt: skip
    keys = [
        Patch(facecolor=COLOURS[depth][0], edgecolor="#555", label=str(depth))
        for depth in sorted(set(depths))
    ]
    figure.legend(
        handles=keys, title="recursions", ncols=max(1, len(keys)), loc="lower left",
        frameon=False, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    _save(figure, path)


def _text_boxes(
    pieces: Sequence[str], depths: Sequence[int], columns: int
) -> tuple[list[tuple[int, int, str, int]], int]:
    """Place of each run of characters, (row, column, text, depth), and the number of rows."""
    boxes = []
    row = column = 0
    for piece, depth in zip(pieces, depths, strict=True):
        for number, line in enumerate(piece.expandtabs(4).split("\n")):
            if number:
                row, column = row + 1, 0
            while line:
                if column == columns:
                    row, column = row + 1, 0
                text, line = line[: columns - column], line[columns - column :]
                boxes.append((row, column, text, depth))
                column += len(text)
    return boxes, row + 1


def router_scores(routing: "RecursionOutput") -> list[tuple[Tensor, Tensor]]:
    """Scores of the tokens at each recursion, and which of them took it.

    Args:
        routing: `output.routing` of a model.

    Returns:
        For each recursion (scores [C] in (0, 1), taken [C] bool). Expert-choice: the sigmoid of the
        logits of the C candidates (the auxiliary router's, where there is one), selected above 0.5
        in evaluation. Token-choice: the softmax share that each of the C = N tokens gave this
        depth, taken where it chose it. A random router's scores, which are no logits, pass
        through the same functions.

    Raises:
        ValueError: a model without a router.
    """
    import torch

    if routing.logits is not None:
        shares = routing.logits.detach().softmax(dim=-1)
        return [(shares[:, r], routing.depths == r + 1) for r in range(shares.shape[1])]
    if not routing.steps:
        raise ValueError("expected the routing of a model with a router, got one without")
    scores = []
    candidates = torch.arange(routing.depths.shape[0], device=routing.depths.device)
    for step in routing.steps:
        logits = step.logits if step.aux_logits is None else step.aux_logits
        assert logits is not None
        scores.append((logits.detach().sigmoid(), torch.isin(candidates, step.rows)))
        candidates = step.rows
    return scores


def plot_router_scores(
    routing: "RecursionOutput | Sequence[RecursionOutput]", path: str | Path, *, bins: int = 40
) -> None:
    """Draws a histogram of the router's scores for each recursion; see `router_scores`.

    Args:
        routing: `output.routing` of a model, or several of them.
        path: the file; its ending chooses the format.
        bins: bars between 0 and 1.

    Raises:
        ValueError: a model without a router.
    """
    import torch

    routings = list(routing) if isinstance(routing, Sequence) else [routing]
    parts = zip(*map(router_scores, routings), strict=True)
    scores = [[torch.cat(pair) for pair in zip(*part, strict=True)] for part in parts]
    token_choice = routings[0].logits is not None
    name = "depth" if token_choice else "recursion"
    labels = ["choose it" if token_choice else "take it", "do not"]
    figure, panels = _figure(height=0.8 + 1.3 * len(scores), rows=len(scores))
    for number, (axes, (values, taken)) in enumerate(zip(panels, scores, strict=True), 1):
        groups = [values[taken].float().cpu().numpy(), values[~taken].float().cpu().numpy()]
        axes.hist(
            groups, bins=bins, range=(0, 1), stacked=True, color=[COLOURS[4][0], COLOURS[2][0]],
            label=labels,
        )  # fmt: skip
        if not token_choice:
            axes.axvline(0.5, color="#000", linewidth=0.8, linestyle="--")
        axes.set(ylabel=f"{name} {number}\ntokens")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    panels[-1].set(xlabel="router score", xlim=(0, 1))
    _save(figure, path)


def plot_loss_against_flops(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    title: str = "Validation loss against training FLOPs",
) -> None:
    """Draws one line for each model and saves the picture.

    Args:
        curves: for each model's name its training FLOPs and its losses (nats per token).
        path: the file; its ending chooses the format.
        title: heading.
    """
    figure, axes = _figure()
    for (name, (flops, losses)), marker in zip(
        curves.items(), "osD^v<>" * len(curves), strict=False
    ):
        axes.plot(flops, losses, marker=marker, label=name)
    axes.set(xlabel="training FLOPs", ylabel="validation loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_loss_against_cost(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path,
    *,
    note: str = "",
    title: str = "Validation loss against the cost of training",
) -> None:
    """Draws one line for each model, against FLOPs and against time, and saves the picture.

    Args:
        curves: for each model's name its points (training FLOPs, training seconds, loss in nats per
            token), as `mor.training.race_results.curve_of` gives them.
        path: the file; its ending chooses the format.
        note: a sentence under the panels; what was held equal, say.
        title: heading.
    """
    figure, panels = _figure(height=5, panels=2)
    for (name, points), marker in zip(curves.items(), "osD^v<>" * len(curves), strict=False):
        flops, seconds, losses = zip(*points, strict=True)
        panels[0].plot(flops, losses, marker=marker, markersize=4, label=name)
        panels[1].plot(seconds, losses, marker=marker, markersize=4, label=name)
    panels[0].set(xlabel="training FLOPs", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="training time (seconds)")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title)
    if note:
        figure.supxlabel("\n".join(wrap(note, 115)), fontsize=9)
    _save(figure, path)


def plot_depth_by_position(depths: Tensor, path: str | Path, *, bins: int = 64) -> None:
    """Draws a heat map: at each position, the share of the tokens that took each recursion depth.

    Args:
        depths: [B, S] int64, recursions of each token; 0 marks padding.
        path: the file; its ending chooses the format.
        bins: positions are averaged in at most this many bins.

    Raises:
        ValueError: depths of another rank or without tokens.
    """
    import torch

    if depths.dim() != 2 or not bool((depths > 0).any()):
        raise ValueError(f"expected depths of shape [B, S] with a token, got {list(depths.shape)}")
    deepest = int(depths.max())
    columns = torch.arange(depths.shape[1]) * min(bins, depths.shape[1]) // depths.shape[1]
    counts = torch.zeros(deepest + 1, int(columns[-1]) + 1)
    weight = torch.ones(depths.shape)
    counts.index_put_((depths.cpu(), columns.expand_as(depths)), weight, accumulate=True)
    shares = counts[1:] / counts[1:].sum(0).clamp(min=1)

    figure, axes = _figure(height=1.5 + 0.5 * deepest)
    image = axes.imshow(
        shares.numpy(),
        aspect="auto",
        origin="lower",
        cmap="cividis",
        vmin=0,
        vmax=1,
        extent=(0, depths.shape[1], 0.5, deepest + 0.5),
    )
    axes.set(xlabel="position", ylabel="recursions", yticks=range(1, deepest + 1))
    figure.colorbar(image, label="share of the tokens")
    _save(figure, path)


def _save(figure, path: str | Path) -> None:  # type: ignore[no-untyped-def]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Without the date, which would make the same numbers another file.
    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    figure.savefig(path, dpi=_DPI, metadata=metadata)


# matplotlib's figure and axes; a list of axes if rows, or panels side by side, are given.
def _figure(  # type: ignore[no-untyped-def]
    height: float = 4.5, width: float = 8, rows: int | None = None, panels: int | None = None
):
    # Not pyplot: it keeps global state and may pick a backend that needs a display.
    with extra("plots"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if rows is not None:
        return figure, list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
    if panels is not None:
        return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    return figure, figure.subplots()
