"""DynaMoE's MLP-only classifier on scikit-learn's digits: active experts under each gate.

    python examples/sister/dynamoe.py --output runs/dynamoe

Trains the paper's kind of network (layers of experts, no attention) with each gate, and with each
expert schedule at an equal total of experts, three seeds each. Prints two tables, and draws the
histogram of active experts for each gate. Needs scikit-learn and matplotlib, and two minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from mor.modules import GATES, DynaMoE
from mor.schedules import EXPERT_SCHEDULES, expert_schedule

WIDTH, NUM_LAYERS, NUM_EXPERTS = 64, 4, 8


class Classifier(nn.Module):
    """Residual layers of experts between two linear maps; one digit is one token."""

    def __init__(self, counts: Sequence[int], **options: object) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in counts)
        self.layers = nn.ModuleList(DynaMoE(WIDTH, WIDTH, count, **options) for count in counts)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 64] pixels to [N, 10] logits."""
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.last(x)


def train(counts: Sequence[int], seed: int, steps: int, **options: object) -> dict[str, object]:
    """Trains one network; returns its test accuracy and, per layer, counts of active experts."""
    digits = load_digits()
    torch.manual_seed(seed)
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    held_out, rest = order[:360], order[360:]
    model = Classifier(counts, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (128,))]
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = (model(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
    active = [layer.num_active_experts for layer in model.layers]
    return {
        "accuracy": right,
        "histogram": [torch.bincount(n, minlength=max(counts) + 1).tolist() for n in active],
        "mean_active": torch.stack(active).double().mean().item(),
    }


def row(name: str, runs: list[dict], more: str = "") -> str:
    """One line of a table: accuracy over the seeds."""
    scores = [100 * run["accuracy"] for run in runs]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    used = statistics.mean(run["mean_active"] for run in runs)
    return f"| {name} | {statistics.mean(scores):.1f} +- {spread:.1f} | {used:.2f} | {more} |"


def main() -> None:
    """Trains all, prints the tables, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/dynamoe"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more gain nothing at these sizes
    start, seeds = time.perf_counter(), range(options.seeds)
    gates = {
        gate: [train([NUM_EXPERTS] * NUM_LAYERS, seed, options.steps, gate=gate) for seed in seeds]
        for gate in GATES
    }
    print("| gate | test accuracy, % | experts a token takes, mean | fewest to most |")
    print("| --- | --- | --- | --- |")
    for gate, runs in gates.items():
        seen = torch.tensor([run["histogram"] for run in runs]).sum((0, 1))
        used = seen.nonzero()[:, 0].tolist()
        print(row(gate, runs, f"{used[0]} to {used[-1]}"))
    schedules = {}
    print("\n| schedule | test accuracy, % | experts a token takes, mean | experts of each layer |")
    print("| --- | --- | --- | --- |")
    for kind in EXPERT_SCHEDULES:
        counts = expert_schedule(kind, NUM_LAYERS, 1, 7, total=16).values
        runs = [train(counts, seed, options.steps, gate="row_quantile") for seed in seeds]
        schedules[kind] = runs
        print(row(kind, runs, " ".join(map(str, counts))))
    figure = Figure(figsize=(10, 2.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(gates), sharey=True)
    for axes, (gate, runs) in zip(places, gates.items(), strict=True):
        for layer in range(NUM_LAYERS):
            seen = torch.tensor([run["histogram"][layer] for run in runs]).sum(0)
            left = torch.arange(len(seen)) + 0.2 * (layer - 1.5)
            axes.bar(left, seen / seen.sum(), 0.2, label=f"layer {layer + 1}")
        axes.set(title=gate, xlabel="active experts", xticks=range(1, NUM_EXPERTS + 1))
        axes.set_xlim(0.4, NUM_EXPERTS + 0.6)
    figure.axes[0].set_ylabel("share of test digits")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(options.output / "dynamoe.png")
    (options.output / "dynamoe.json").write_text(
        json.dumps({"gates": gates, "schedules": schedules}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"\n{time.perf_counter() - start:.0f} s; {options.output / 'dynamoe.png'}")


if __name__ == "__main__":
    main()
