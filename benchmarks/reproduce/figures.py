"""Figures of the experiments, from the same JSON as the tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.reproduce.design import LOSS
from benchmarks.reproduce.records import Run, interval_of, value_of
from mor.analysis.plots import plot_loss_against_cost

__all__ = ["draw"]

#: Text stays text, and the same numbers give the same file.
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "mor"}
_LOSS_LABEL = "validation loss (nats per token)"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws an experiment; most of them as the losses of their variants.

    Args:
        runs: of one experiment and preset, one for each seed.
        path: the file; its ending chooses the format.
    """
    settings = runs[0]["settings"]
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = ", ".join(str(run["settings"]["seed"]) for run in runs)
    title = f"{settings['experiment']}, preset {settings['name']}, seeds {seeds}"
    equal = f"held equal: training {settings['equal']}, text, batch, optimiser"
    with rc_context(_SVG):
        match settings["experiment"]:
            case "wall_time" | "cost":
                plot_loss_against_cost(_mean_curves(runs), path, note=equal, title=title)
                return
            case "isoflop":
                figure = _isoflop(runs)
            case "scaling":
                figure = _measured(runs, "loss_after_", "recursions that run", _LOSS_LABEL, "-")
            case "depth":
                figure = _measured(runs, "depth_", "class of token", "mean recursions", "none")
            case _:
                figure = _losses(runs)
        figure.suptitle(title)
        figure.supxlabel(equal, fontsize=9)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _losses(runs: Sequence[Run]) -> Figure:
    """A row for each variant: every seed's loss, their mean; hollow where evaluated by top-k."""
    names = [result["name"] for result in runs[0]["results"]]
    figure = Figure(figsize=(8, 1.6 + 0.35 * len(names)), layout="constrained")
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
            axes.plot([fmean(values)] * 2, [row - 0.3, row + 0.3], color=edge)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=_LOSS_LABEL)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    if "topk_loss" in runs[0]["results"][-1]["measured"]:
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def _measured(runs: Sequence[Run], prefix: str, xlabel: str, ylabel: str, linestyle: str) -> Figure:
    """For each variant its measured values of a prefix, with their intervals."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in runs[0]["results"]:
        keys = [key for key in result["measured"] if key.startswith(prefix)]
        found = [interval_of(runs, result["name"], key) for key in keys]
        axes.errorbar(
            [key.removeprefix(prefix) for key in keys],
            [one.mean for one in found],
            [one.half_width for one in found],
            marker="o", capsize=3, linestyle=linestyle, label=result["name"],
        )  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _mean_curves(runs: Sequence[Run]) -> dict[str, list[tuple[float, float, float]]]:
    """FLOPs, seconds at the median speed of the turns, and loss; the means over the seeds."""

    def curve(result: Mapping[str, Any]) -> list[tuple[float, float, float]]:
        per_flop = result["train_tokens"] / result["tokens_per_second"] / result["train_flops"]
        return [(flops, flops * per_flop, loss) for flops, _, loss in result["curve"]]

    curves = {}
    for number, result in enumerate(runs[0]["results"]):
        points = zip(*(curve(run["results"][number]) for run in runs), strict=True)
        curves[result["name"]] = [
            tuple(fmean(values) for values in zip(*seeds, strict=True)) for seeds in points
        ]
    return curves


def _isoflop(runs: Sequence[Run]) -> Figure:
    """A panel for each size, a line for each kind of model: mean loss against the FLOPs."""
    results = runs[0]["results"]
    sizes = list(dict.fromkeys(result["size"] for result in results))
    figure = Figure(figsize=(3.2 * len(sizes) + 1, 4.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        of_size = [result for result in results if result["size"] == size]
        for kind in dict.fromkeys(result["name"].split(",")[0] for result in of_size):
            line = [result for result in of_size if result["name"].split(",")[0] == kind]
            losses = [interval_of(runs, result["name"], LOSS).mean for result in line]
            axes.plot([result["train_flops"] for result in line], losses, marker="o", label=kind)
        axes.set(title=size, xscale="log", xlabel="training FLOPs", ylabel=_LOSS_LABEL)
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure
