"""p-MoD's progressive ratio decay against other schedules of the same budget, on digits.

    python examples/sister/pmod.py --output runs/pmod

Trains a small LLaVA from scratch to name scikit-learn's digits, 16 patches each, under schedules
that keep 68 of the 128 (patch, layer) pairs: decaying, constant, reversed, interleaved. Measures
the shares of keys and of executed pairs, which equal the schedule's mean. Three seeds each; prints
a table as it goes and draws the picture. Needs scikit-learn and matplotlib, and six minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import mor
from mor.schedules import Schedule, shifted_cosine

NUM_LAYERS, IMAGE, QUESTION = 8, 11, 10


def rounded(schedule: Schedule, patches: int) -> Schedule:
    """The same, with a whole number of patches in every layer."""
    return Schedule([round(ratio * patches) / patches for ratio in schedule], schedule.name)


def schedules() -> dict[str, Schedule]:
    """68 of 128 pairs each."""
    decay = rounded(shifted_cosine(NUM_LAYERS), 16)
    return {
        "decay (p-MoD)": decay,
        "constant": Schedule([9 / 16, 8 / 16] * 4),
        "reversed": Schedule(decay.values[::-1]),
        "interleaved": Schedule([1.0, 1 / 16] * 4),
    }


def llava(side: int) -> LlavaForConditionalGeneration:
    """Patches of 2x2 pixels, embedded by CLIP's first layer, and a decoder."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=side,
        patch_size=2,
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=3,
        num_hidden_layers=NUM_LAYERS,
        vocab_size=12,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(side // 2) ** 2,
    )
    return LlavaForConditionalGeneration(config)


def prompts(pixels: Tensor) -> dict[str, Tensor]:
    """A picture each, and a question."""
    patches = (pixels.shape[-1] // 2) ** 2
    ids = torch.tensor([IMAGE] * patches + [QUESTION]).expand(len(pixels), -1)
    return {"input_ids": ids, "pixel_values": pixels}


def shares(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[float, float]:
    """Of the vision tokens in all layers: whose keys are cached, and who are executed."""
    cache = DynamicCache(config=model.config.text_config)
    inputs = prompts(pixels)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    batch, length = inputs["input_ids"].shape
    cached = executed = 0
    for layer, kept in zip(model.model.language_model.layers, cache.layers, strict=True):
        routed = isinstance(layer, mor.systems.PMoD)
        cached += int(kept.lengths.sum()) if routed else batch * kept.get_seq_length()
        executed += int(layer.token_depths.sum()) if routed else batch * length
    text = batch * NUM_LAYERS
    every = text * (length - 1)
    return (cached - text) / every, (executed - text) / every


def train(schedule: Schedule | None, seed: int, steps: int) -> dict[str, float]:
    """Trains one model; `schedule` None: every layer takes every patch."""
    digits = load_digits()
    torch.manual_seed(seed)
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    held_out, rest = order[:360], order[360:]
    model = llava(8)
    if schedule is not None:
        mor.apply_pmod(model, schedule)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (64,))]
        logits = model(**prompts(x[batch]), logits_to_keep=1).logits[:, 0]
        functional.cross_entropy(logits, y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = model(**prompts(x[held_out]), logits_to_keep=1).logits[:, 0]
    cached, executed = (1.0, 1.0) if schedule is None else shares(model, x[held_out[:32]])
    return {
        "cross entropy": functional.cross_entropy(logits, y[held_out]).item(),
        "accuracy": (logits.argmax(1) == y[held_out]).double().mean().item(),
        "cached": cached,
        "executed": executed,
    }


def spread(runs: list[dict[str, float]], name: str, factor: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [factor * run[name] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Schedules, and the cross entropy under each."""
    figure = Figure(figsize=(9, 2.8), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, schedule in schedules().items():
        left.plot(range(NUM_LAYERS), schedule.values, marker="o", label=name)
    left.set(xlabel="layer", ylabel="share of the patches", title="same budget, 68 of 128")
    left.legend(fontsize=7)
    found = {name: spread(runs, "cross entropy") for name, runs in results.items()}
    means, errors = zip(*found.values(), strict=True)
    right.bar(range(len(found)), means, yerr=errors, color="#4477aa", capsize=3)
    right.set_xticks(range(len(found)), [*found], fontsize=7)
    right.set_ylabel("test cross entropy")
    figure.savefig(path)


def main() -> None:
    """Trains all, prints the table, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pmod"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more gain nothing at these sizes
    start = time.perf_counter()
    published = rounded(shifted_cosine(NUM_LAYERS), 100)
    model = mor.apply_pmod(llava(20).eval(), published)
    cached, executed = shares(model, torch.randn(1, 3, 20, 20))
    print(f"published setting, pictures of 100 patches: mean {published.mean:.4f}, ", end="")
    print(f"keys {cached:.4f}, executed {executed:.4f}\n")
    print("| schedule | mean | keys | executed | test cross entropy | test accuracy, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = {}
    for name, schedule in {"every patch": None, **schedules()}.items():
        runs = [train(schedule, seed, options.steps) for seed in range(options.seeds)]
        results[name] = runs
        mean = 1.0 if schedule is None else schedule.mean
        assert all(run["cached"] == run["executed"] == mean for run in runs)
        loss, right = spread(runs, "cross entropy"), spread(runs, "accuracy", 100)
        cells = [name, f"{mean:.5f}", f"{runs[0]['cached']:.5f}", f"{runs[0]['executed']:.5f}"]
        cells += [f"{loss[0]:.3f} +- {loss[1]:.3f}", f"{right[0]:.1f} +- {right[1]:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    draw(results, options.output / "pmod.png")
    (options.output / "pmod.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    print(f"\n{time.perf_counter() - start:.0f} s; {options.output / 'pmod.png'}")


if __name__ == "__main__":
    main()
