"""A p-MoD and a VideoLLM-MoD layer against the full layer, and against their share of its FLOPs.

Prompts of LLaVA-1.5: 576 vision tokens of a picture among 64 of text; and a clip of 64 frames of 9.
p-MoD's 0.5375 is the mean of its published schedule, 0.15 its last layers. `x limit full` is the
time of Transformers' Llama layer with SDPA over ours, `FLOPs` our share of its FLOPs (products and
visible pairs) and `time / FLOPs` our share of its time over that: 1 if no time is lost to routing.
"""

import torch
from harness import DTYPES, dtype_name, line, parse_args, report, wanted
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mor.models.attention import AttentionContext
from mor.modules.packing import pack
from mor.systems import PMoD, VideoMoD
from mor.systems.vision_tokens import FrameSizes, VisionTokens

TEXT = 64
#: layer, ratio, vision tokens of a frame or picture, frames
LAYERS = [(PMoD, 0.5375, 576, 1), (PMoD, 0.15, 576, 1), (VideoMoD, 0.2, 9, 64)]
# batch, hidden size
SHAPES = [(4, 512), (1, 1024)]


def flops(config: LlamaConfig, tokens: int) -> int:
    """Of a layer on a sequence."""
    width, inner = config.hidden_size, config.intermediate_size
    return 2 * tokens * (4 * width**2 + 3 * width * inner) + 2 * width * tokens * (tokens + 1)


def measure(
    kind: type[PMoD | VideoMoD],
    ratio: float,
    frame: int,
    frames: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    training: bool,
) -> None:
    batch, width = shape
    length = TEXT + frames * frame
    what = {"layer": kind.__name__, "ratio": str(ratio), "shape": f"{batch}x{length}x{width}"}
    what |= {"dtype": dtype_name(dtype), "pass": "train" if training else "forward"}
    if not wanted(what):
        return
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_attention_heads=heads,
        num_key_value_heads=heads,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    full = LlamaDecoderLayer(config, 0).to(dtype)
    routed = kind(LlamaDecoderLayer(config, 0), width, 0, 1, ratio).to(dtype)
    routed.layer.load_state_dict(full.state_dict())
    routed.layer.self_attn.config = LlamaConfig(**config.to_dict())
    routed.layer.self_attn.config._attn_implementation = "mor"
    nn.init.normal_(routed.router.weight, std=0.02)
    x = torch.randn(batch, length, width, dtype=dtype, requires_grad=training)
    vision = torch.zeros(batch, length, dtype=torch.bool)
    vision[:, TEXT // 2 : length - TEXT // 2] = True
    packed = pack((batch, length), x.device)
    tokens = VisionTokens.of_frames(packed, vision, FrameSizes(frame, frame), "benchmark")
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    rows = tuple(packed.pack(part.expand(batch, -1, -1)) for part in angles)
    context = AttentionContext(packed.packing)

    def ours() -> torch.Tensor:
        return routed.run(packed.pack(x), tokens, rows, context)[0]

    def dense() -> torch.Tensor:
        return full(x, position_embeddings=angles)

    def train(run) -> None:
        run().sum().backward()

    kept = TEXT + frames * max(int(ratio * frame), kind is VideoMoD)
    share = flops(config, kept) / flops(config, length)
    timed = {
        name: (lambda run=run: train(run)) if training else torch.no_grad()(run)
        for name, run in (("ours", ours), ("limit full", dense))
    }
    row = line(what, timed)
    if "x limit full" in row:
        row |= {"FLOPs": share, "time / FLOPs": 1 / row["x limit full"] / share}


if __name__ == "__main__":
    args = parse_args(__doc__)
    torch.manual_seed(0)
    for dtype in DTYPES:
        for layer in LAYERS:
            for shape in [(1, 64)] if args.smoke else SHAPES:
                for training in (False, True):
                    measure(*layer, shape, dtype, training)
    report("vision_layers")
