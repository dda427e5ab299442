"""Mixture-of-Depths on text: loss against training FLOPs, and causal selection against exact k.

    python examples/sister/mod.py --output runs/mod

Trains small character-level Llamas on the help texts of Python's own language reference: dense, and
with mor.apply_mod at the published setting (an eighth of the tokens in every other layer) for as
many steps, and for as many FLOPs. Three seeds each; prints a table as it goes and draws the
held-out loss, computed causally, against FLOPs. Needs matplotlib, and three minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mor
from mor.models.swap.routed_layers import RoutedLayers
from mor.schedules import interleave

LENGTH, BATCH, WIDTH, INNER, NUM_LAYERS, CAPACITY = 64, 16, 64, 160, 4, 0.125
HELD_OUT = 256 * LENGTH  # characters, the last of the text


def text() -> tuple[Tensor, int]:
    """The help texts as character numbers, and how many characters there are."""
    whole = "\n".join(topics.values())
    characters = sorted(set(whole))
    return torch.tensor([characters.index(c) for c in whole]), len(characters)


def flops_of_a_step(ratios: list[float], vocabulary: int) -> float:
    """Of forward and backward on a batch: products and visible pairs of each layer's tokens."""
    kept = [max(1, int(ratio * LENGTH)) for ratio in ratios]
    layers = sum(2 * k * (4 * WIDTH**2 + 3 * WIDTH * INNER) + 2 * WIDTH * k * (k + 1) for k in kept)
    return 3.0 * BATCH * (layers + 2 * LENGTH * WIDTH * vocabulary)


def train(routed: bool, seed: int, steps: int, every: int) -> dict[str, object]:
    """Trains one model; the held-out loss on the way, and what its routers did at the end."""
    tokens, vocabulary = text()
    split = len(tokens) - HELD_OUT
    held_out = tokens[split:].view(-1, LENGTH)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_hidden_layers=NUM_LAYERS,
        vocab_size=vocabulary,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    ratios = [1.0] * NUM_LAYERS
    if routed:
        ratios = list(interleave(NUM_LAYERS, CAPACITY))
        mor.apply_mod(model, CAPACITY, loss_coefficients={"aux_loss": 0.01})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        begins = torch.randint(split - LENGTH, (BATCH,))
        rows = tokens[begins[:, None] + torch.arange(LENGTH)]
        model.train()(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            with torch.no_grad():
                out = model.eval()(held_out, labels=held_out)
            losses.append(out.lm_loss.item() if routed else out.loss.item())
    found = {"losses": losses, "flops": flops_of_a_step(ratios, vocabulary), "every": every}
    if routed:
        blocks = [layer for layer in model.model.layers if isinstance(layer, RoutedLayers)]
        model.train()
        for block in blocks:
            block.recursion.metrics.reset()
        with torch.no_grad():
            model(held_out)
        agree = [block.recursion.metrics.compute()["sampling_accuracy"] for block in blocks]
        with torch.no_grad():
            depths = model.eval()(held_out).token_depths
        found["agreement"] = statistics.mean(agree)
        found["taken"] = depths.double().mean().item() / len(blocks)
    return found


def row(name: str, runs: list[dict]) -> str:
    """One line of the table."""
    last = [run["losses"][-1] for run in runs]
    spread = statistics.stdev(last) if len(last) > 1 else 0.0
    steps = len(runs[0]["losses"]) * runs[0]["every"]
    cells = [name, str(steps), f"{steps * runs[0]['flops'] / 1e9:.0f}"]
    cells.append(f"{statistics.mean(last):.3f} +- {spread:.3f}")
    for key in ("agreement", "taken"):
        values = [100 * run[key] for run in runs if key in run]
        cells.append(f"{statistics.mean(values):.1f}" if values else "")
    return f"| {' | '.join(cells)} |"


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Held-out loss against FLOPs, a line for each model."""
    figure = Figure(figsize=(6, 3), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, runs in results.items():
        losses = torch.tensor([run["losses"] for run in runs])
        step = runs[0]["flops"] * runs[0]["every"] / 1e9
        at = step * torch.arange(1, losses.shape[1] + 1)
        error = losses.std(0) if len(runs) > 1 else torch.zeros(losses.shape[1])
        axes.errorbar(at, losses.mean(0), yerr=error, capsize=2, label=name)
    axes.set(xlabel="training GFLOPs", ylabel="held-out loss (causal)")
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Trains all, prints the table, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mod"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more gain nothing at these sizes
    start, every = time.perf_counter(), max(options.steps // 5, 1)
    vocabulary = text()[1]
    full, fewer = (
        flops_of_a_step(ratios, vocabulary)
        for ratios in ([1.0] * NUM_LAYERS, [*interleave(NUM_LAYERS, CAPACITY)])
    )
    longer = round(options.steps * full / fewer / every) * every
    models = {
        "dense": (False, options.steps),
        "MoD, as many steps": (True, options.steps),
        "MoD, as many FLOPs": (True, longer),
    }
    print("| model | steps | GFLOPs | held-out loss | causal agrees with exact k, % | taken, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = {}
    for name, (routed, steps) in models.items():
        runs = [train(routed, seed, steps, every) for seed in range(options.seeds)]
        results[name] = runs
        print(row(name, runs), flush=True)
    draw(results, options.output / "mod.png")
    (options.output / "mod.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - start:.0f} s; {options.output / 'mod.png'}")


if __name__ == "__main__":
    main()
