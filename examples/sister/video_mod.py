"""VideoLLM-MoD on a stream: memory and time against frames, beside the dense model.

    python examples/sister/video_mod.py --output runs/video_mod

Pans and zooms over a photograph of scikit-learn, and gives the frames one by one, 25 vision tokens
each, to a small LLaVA-NeXT-Video with a cache, dense and with mor.apply_video_mod at the published
setting (a fifth of the tokens in every other layer). Three seeds of random weights, as neither
memory nor time depends on training. Prints a table and draws both, and which patches of frames
stay in a layer. Time is CPU time of one thread. Needs scikit-learn and matplotlib, and two minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

import mor

SIDE, PATCH, GRID = 60, 6, 5
FRAME, NUM_LAYERS, NUM_HEADS, VIDEO = GRID * GRID, 8, 10, 31
MODELS = ("dense", "VideoLLM-MoD")


def clip(num_frames: int) -> Tensor:
    """A photograph panned and zoomed into frames: [1, F, 3, SIDE, SIDE]."""
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    frames = []
    for i in range(num_frames):
        t = i / max(num_frames - 1, 1)
        size = int(420 - 240 * t)
        top, left = int(t * (420 - size)), int(t * (640 - size))
        window = photograph[None, :, top : top + size, left : left + size].float() / 255
        frames.append(functional.interpolate(window, (SIDE, SIDE), mode="area"))
    return torch.stack(frames, dim=1)


def llava(seed: int) -> LlavaNextVideoForConditionalGeneration:
    """10x10 patches a frame, pooled to 5x5 tokens, and a decoder of 8 layers."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=640,
        intermediate_size=1728,
        num_attention_heads=NUM_HEADS,
        num_hidden_layers=NUM_LAYERS,
        vocab_size=32,
    )
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=text, video_token_index=VIDEO, image_token_index=30
    )
    torch.manual_seed(seed)
    return LlavaNextVideoForConditionalGeneration(config).eval()


def cached_bytes(cache: DynamicCache) -> int:
    """Of keys and values of the tokens that took each layer."""
    total = 0
    for layer in cache.layers:
        rows = layer.lengths.sum().item() if hasattr(layer, "lengths") else layer.get_seq_length()
        width = layer.keys.shape[-1] * NUM_HEADS
        total += 2 * int(rows) * width * layer.keys.element_size()
    return total


def stream(
    models: dict[str, LlavaNextVideoForConditionalGeneration], frames: Tensor
) -> dict[str, dict[str, list[float]]]:
    """Gives each frame to every model in turn: bytes cached behind it, and seconds for it."""
    caches = {name: DynamicCache(config=model.config.text_config) for name, model in models.items()}
    found = {name: {"bytes": [], "seconds": []} for name in models}
    ids = torch.full((1, FRAME), VIDEO)
    with torch.no_grad():
        for i in range(frames.shape[1]):
            for name, model in models.items():
                frame, cache = frames[:, i : i + 1], caches[name]
                begin = time.thread_time()
                model(ids, pixel_values_videos=frame, past_key_values=cache, logits_to_keep=1)
                found[name]["seconds"].append(time.thread_time() - begin)
                found[name]["bytes"].append(cached_bytes(cache))
    return found


def kept_patches(model: LlavaNextVideoForConditionalGeneration, frames: Tensor) -> Tensor:
    """[F, GRID, GRID]: 1 where a token of a frame takes the first routed layer."""
    ids = torch.full((1, FRAME * frames.shape[1]), VIDEO)
    with torch.no_grad():
        model(ids, pixel_values_videos=frames)
    return model.model.language_model.layers[1].token_depths.view(-1, GRID, GRID)


def draw(runs: list[dict], frames: Tensor, kept: Tensor, path: Path) -> None:
    """Memory, time, and frames whose skipped patches are dark."""
    figure = Figure(figsize=(9, 5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    memory, seconds = above.subplots(1, 2)
    for name in MODELS:
        found = torch.tensor([[run[name]["bytes"], run[name]["seconds"]] for run in runs])
        count = torch.arange(1, found.shape[-1] + 1)
        memory.plot(count, found[0, 0] / 2**20, label=name)
        blocks = found[:, 1].unfold(1, 8, 8).median(2).values * 1e3  # of 8 frames
        middle = blocks.mean(0)
        error = blocks.std(0) if len(runs) > 1 else torch.zeros_like(middle)
        seconds.errorbar(count[7::8], middle, yerr=error, capsize=2, label=name)
    memory.set(xlabel="frames", ylabel="MiB of keys and values", title="memory")
    seconds.set(xlabel="frames", ylabel="ms for a frame", title="time")
    memory.legend()
    seconds.set_ylim(bottom=0)
    shown = range(0, frames.shape[1], frames.shape[1] // 6)
    for axes, i in zip(below.subplots(1, 6), shown, strict=False):
        light = kept[i].repeat_interleave(SIDE // GRID, 0).repeat_interleave(SIDE // GRID, 1)
        axes.imshow((frames[0, i] * (0.25 + 0.75 * light)).permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[], xlabel=f"frame {i + 1}")
    below.suptitle("patches that take the second layer (untrained router)", fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Streams, prints the table, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/video_mod"))
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start, frames, runs = time.perf_counter(), clip(options.frames), []
    for seed in range(options.seeds):
        routed = mor.apply_video_mod(llava(seed))
        models = dict(zip(MODELS, (llava(seed), routed), strict=True))
        stream(models, frames[:, :2])  # warms up
        runs.append(stream(models, frames))
    print("| frames | MiB dense | MiB routed | share | ms dense | ms routed | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in (n for n in (8, 32, 64, 128, 256) if n <= options.frames):
        size = [runs[0][name]["bytes"][count - 1] / 2**20 for name in MODELS]
        times = [[1e3 * statistics.median(run[name]["seconds"][count - 8 : count]) for run in runs]
                 for name in MODELS]  # fmt: skip
        spent = [
            f"{statistics.mean(t):.1f} +- {statistics.stdev(t) if len(t) > 1 else 0:.1f}"
            for t in times
        ]
        ratio = statistics.mean(times[1]) / statistics.mean(times[0])
        print(f"| {count} | {size[0]:.2f} | {size[1]:.2f} | {size[1] / size[0]:.4f} ", end="")
        print(f"| {spent[0]} | {spent[1]} | {ratio:.2f} |")
    draw(runs, frames, kept_patches(routed, frames), options.output / "video_mod.png")
    (options.output / "video_mod.json").write_text(json.dumps(runs) + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - start:.0f} s; {options.output / 'video_mod.png'}")


if __name__ == "__main__":
    main()
