"""Accuracy of a small trained ViT against the share of tokens kept: ToMe and random pruning.

Trains on scikit-learn's digits, 16 tokens of 2 x 2 pixels, then merges or drops tokens at
evaluation without training again:

    python examples/sister/token_merging.py            # 3 seeds, a few minutes
    python examples/sister/token_merging.py --epochs 1 --seeds 1 --output-dir runs/merging
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import mor

LAYERS, TOKENS = 4, 17
REMOVALS = (0, 1, 2, 3, 4, 6, 8)  # in each layer


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and a fifth to test on."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    cut = len(y) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def trained(seed: int, x: Tensor, y: Tensor, epochs: int) -> ViTForImageClassification:
    """A ViT of 16 tokens and a class token."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    model, batch = ViTForImageClassification(config), 64
    steps = epochs * (len(y) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(y))
        for rows in order[: len(y) // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]).logits, y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: ViTForImageClassification, x: Tensor, y: Tensor) -> float:
    """Share of the images whose label is right."""
    with torch.inference_mode():
        return (model(x).logits.argmax(1) == y).float().mean().item()


def left(tokens: int, r: int) -> int:
    """How many of the tokens a layer leaves: at most half of those that are not the class token."""
    return tokens - min(r, (tokens - 1) // 2)


class DropAtRandom:
    """A hook behind a layer: drops r tokens of each image, never the class token."""

    def __init__(self, r: int, generator: torch.Generator) -> None:
        self.r, self.generator = r, generator

    def __call__(self, layer: Any, args: Any, x: Tensor) -> Tensor:
        """[B, N, D] to [B, M, D], M as many as a merge of r pairs leaves."""
        chance = torch.rand(x.shape[:2], generator=self.generator)
        chance[:, 0] = -1  # first of those kept
        kept = chance.argsort(dim=1)[:, : left(x.shape[1], self.r)].sort(dim=1).values
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))


def pruned_accuracy(model: ViTForImageClassification, x: Tensor, y: Tensor, r: int) -> float:
    """With r random tokens dropped behind each layer."""
    hook = DropAtRandom(r, torch.Generator().manual_seed(0))
    handles = [layer.register_forward_hook(hook) for layer in model.vit.layers]
    try:
        return accuracy(model, x, y)
    finally:
        for handle in handles:
            handle.remove()


def merged_accuracy(
    model: ViTForImageClassification, x: Tensor, y: Tensor, r: int, proportional: bool
) -> float:
    """With r pairs merged in each layer."""
    mor.apply_token_merging(model, r=r, proportional=proportional)
    try:
        return accuracy(model, x, y)
    finally:
        mor.remove(model)


def kept(r: int) -> float:
    """Mean share of the tokens in the layers' outputs."""
    counts = [TOKENS]
    for _ in range(LAYERS):
        counts.append(left(counts[-1], r))
    return fmean(counts[1:]) / TOKENS


def draw(
    results: dict[str, list[list[float]]],
    model: ViTForImageClassification,
    x: Tensor,
    path: Path,
) -> None:
    """Accuracy against the share kept, and which patches of four digits merged."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    shares = [kept(r) for r in REMOVALS]
    for name, rows in results.items():
        columns = list(zip(*rows, strict=True))
        spread = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
        means = [fmean(column) for column in columns]
        axes.errorbar(shares, means, yerr=spread, label=name, marker="o", capsize=3)
    axes.set(xlabel="share of the tokens kept, mean of the layers", ylabel="test accuracy")
    axes.invert_xaxis()
    axes.legend()
    mor.apply_token_merging(model, r=REMOVALS[3])
    with torch.inference_mode():
        model(x[:4])
    merging = model.token_merging
    right.suptitle(f"patches that share a colour became one of {merging.size.shape[1] - 1} tokens")
    for index, pair in enumerate(right.subplots(2, 4).T):
        groups = merging.sources[index, 1:].view(4, 4)
        pair[0].imshow(x[index, 0], cmap="gray")
        pair[1].imshow(groups, cmap="tab20", vmin=1, vmax=20)
        for part in pair:
            part.set_axis_off()
    mor.remove(model)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, evaluates and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/token_merging"))
    args = parser.parse_args()
    results: dict[str, list[list[float]]] = {
        "ToMe": [], "ToMe without attention by size": [], "random pruning": [],
    }  # fmt: skip
    for seed in range(args.seeds):
        x, y, test_x, test_y = data(seed)
        model = trained(seed, x, y, args.epochs)
        found = [
            [merged_accuracy(model, test_x, test_y, r, True) for r in REMOVALS],
            [merged_accuracy(model, test_x, test_y, r, False) for r in REMOVALS],
            [pruned_accuracy(model, test_x, test_y, r) for r in REMOVALS],
        ]
        for rows, row in zip(results.values(), found, strict=True):
            rows.append(row)
    print("| tokens kept | " + " | ".join(results) + " |")
    print("| --- " * (len(results) + 1) + "|")
    for index, r in enumerate(REMOVALS):
        cells = [
            f"{fmean(row[index] for row in rows):.3f} ({min(row[index] for row in rows):.3f} to "
            f"{max(row[index] for row in rows):.3f})"
            for rows in results.values()
        ]
        print(f"| {kept(r):.0%} | " + " | ".join(cells) + " |")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, model, test_x, args.output_dir / "token_merging.png")


if __name__ == "__main__":
    main()
