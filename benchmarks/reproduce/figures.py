"""Figures of the experiments, from the same JSON as the tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.reproduce.design import LOSS
from benchmarks.reproduce.intervals import interval
from benchmarks.reproduce.page import value_of

__all__ = ["draw"]


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws an experiment: loss against budget for isoFLOP, else the losses of the variants.

    Args:
        runs: of one experiment and preset, one for each seed.
        path: the file; its ending chooses the format.
    """
    panels = _isoflop if runs[0]["settings"]["experiment"] == "isoflop" else _losses
    figure = panels(runs)
    settings = runs[0]["settings"]
    seeds = ", ".join(str(run["settings"]["seed"]) for run in runs)
    figure.suptitle(f"{settings['experiment']}, preset {settings['name']}, seeds {seeds}")
    figure.supxlabel(
        f"validation loss (nats per token); held equal: training {settings['equal']}, text, batch, "
        "optimiser",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _losses(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each variant: every seed's loss, their mean; hollow where evaluated by top-k."""
    names = [result["name"] for result in runs[0]["results"]]
    figure = Figure(figsize=(8, 1.4 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    kinds = [(LOSS, "causal", "C0", "C0"), ("topk_loss", "top-k", "none", "C1")]
    for key, label, face, edge in kinds:
        rows = [
            row
            for row, result in enumerate(runs[0]["results"])
            if key in result or key in result["measured"]
        ]
        for row in rows:
            values = [value_of(run, names[row], key) for run in runs]
            axes.scatter(
                values, [row] * len(values), facecolors=face, edgecolors=edge,
                label=label if row == rows[0] else None,
            )  # fmt: skip
            axes.plot([interval(values).mean] * 2, [row - 0.3, row + 0.3], color=edge)
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return figure


def _isoflop(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each size, a line for each kind of model: mean loss against the FLOPs."""
    results = runs[0]["results"]
    sizes = list(dict.fromkeys(result["size"] for result in results))
    figure = Figure(figsize=(3.2 * len(sizes) + 1, 4.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        of_size = [result for result in results if result["size"] == size]
        for kind in dict.fromkeys(result["name"].split(",")[0] for result in of_size):
            line = [result for result in of_size if result["name"].split(",")[0] == kind]
            losses = [
                interval([value_of(run, result["name"], LOSS) for run in runs]).mean
                for result in line
            ]
            axes.plot([result["train_flops"] for result in line], losses, marker="o", label=kind)
        axes.set(title=size, xscale="log", xlabel="training FLOPs")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure
