"""Decoding and prefill over a paged cache: contexts, windows and every head size."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import paged_depth_attention
from mor.ops.paged_depth_attention import reference
from tests.cases.kv_gather import make_table
from tests.support.operators import OpCase, packed

NAMES = (
    "q", "k_cache", "v_cache", "block_table", "context_lens", "cu_seqlens_q", "context_starts",
    "scale",
)  # fmt: skip


def make_inputs(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    *,
    queries: list[int],
    keys: list[int],
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    block_size: int = 16,
    contexts: str = "last",
    window: int | None = None,
    shared: bool = False,
    scale: float | None = None,
) -> dict[str, Any]:
    """Entries of `keys` cached keys, in blocks out of order.

    contexts "last": the queries are the newest tokens, the last one sees all keys; "any": bounds
    are random and rise; "all": every query sees all keys. window: of so many keys.
    """
    generator = generator or torch.Generator().manual_seed(0)
    table, num_blocks = make_table(keys, block_size, generator, shared)
    lens = [torch.zeros(0, dtype=torch.int64)]
    for num_queries, num_keys in zip(queries, keys, strict=True):
        newest = (torch.arange(num_queries) + num_keys - num_queries + 1).clamp(min=0)
        drawn = torch.randint(0, num_keys + 1, (num_queries,), generator=generator)
        choice = {"last": newest, "any": drawn.sort().values, "all": newest * 0 + num_keys}
        lens.append(choice[contexts])
    context_lens = torch.cat(lens).to(torch.int32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    cache = (num_blocks, block_size, heads[1], head_dim)
    inputs = {
        "q": normal(sum(queries), heads[0], head_dim),
        "k_cache": normal(*cache),
        "v_cache": normal(*cache),
        "block_table": table,
        "context_lens": context_lens,
        "cu_seqlens_q": packed(queries),
        "context_starts": None if window is None else (context_lens - window).clamp(min=0),
        "scale": scale,
    }
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def raw_args(**inputs: Any) -> tuple[Any, ...]:
    scale = inputs["q"].shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    return (*(inputs[name] for name in NAMES[:-1]), scale)


def case(name: str, opcheck: bool = False, **options: Any) -> OpCase:
    return OpCase(
        id=name,
        op=paged_depth_attention,
        reference=reference,
        raw=torch.ops.mor.paged_depth_attention.default,
        opcheck=opcheck,
        raw_args=raw_args,
        make=lambda *args: make_inputs(*args, **options),
    )


GQA = {"heads": (9, 3), "head_dim": 64}
DECODE: dict[str, Any] = {"queries": [1] * 6, "keys": [300, 33, 64, 1, 0, 129]}
MIXED: dict[str, Any] = {"queries": [1, 0, 40, 3, 7, 2], "keys": [90, 20, 70, 5, 40, 300]}
CASES = [
    case("no-entries", opcheck=True, queries=[], keys=[]),
    case("no-queries", queries=[0, 0], keys=[3, 0]),
    case("no-keys", queries=[3, 1], keys=[0, 0]),
    case("no-heads", queries=[3], keys=[5], heads=(0, 1)),
    case("single", queries=[1], keys=[1], heads=(1, 1), head_dim=1, block_size=1),
    case("decode", **DECODE, **GQA),
    case("decode-shared-blocks", **DECODE, **GQA, shared=True, block_size=5),
    case("decode-window", opcheck=True, **DECODE, **GQA, window=50),
    case("decode-head-20", **DECODE, heads=(4, 2), head_dim=20, block_size=5),
    case("decode-head-128", **DECODE, heads=(2, 1), head_dim=128),
    case("decode-head-256-block-1", **DECODE, heads=(1, 1), head_dim=256, block_size=1),
    case("decode-8-heads-of-one", **DECODE, heads=(8, 1), head_dim=32),
    case("decode-40-heads-of-one", **DECODE, heads=(40, 1), head_dim=32),
    case("decode-one-long", queries=[1], keys=[1500], **GQA),
    # 64 pieces of 128 keys, CUDA's most and least, would end before the window.
    case("decode-end-of-long", queries=[1], keys=[8300], heads=(1, 1), head_dim=8, window=100),
    case("few-queries-any", queries=[2, 3, 4], keys=[300, 90, 17], **GQA, contexts="any"),
    case("few-queries-window", queries=[4, 4], keys=[300, 90], **GQA, contexts="any", window=30),
    case("mixed", opcheck=True, **MIXED, heads=(4, 2), block_size=7),
    case("mixed-any-window", **MIXED, heads=(4, 2), contexts="any", window=9, head_dim=24),
    case("mixed-window-of-none", **MIXED, contexts="any", window=0),
    case("all-keys", **MIXED, heads=(2, 1), contexts="all"),
    case("prefill", queries=[130, 60], keys=[130, 200], **GQA),
    case("prefill-split", opcheck=True, queries=[20], keys=[900], heads=(2, 1), head_dim=32),
    case("prefill-window", queries=[100], keys=[700], heads=(3, 1), head_dim=17, window=40),
    case("prefill-rising", queries=[40], keys=[600], heads=(4, 2), head_dim=32, scale=1.0),
    case("prefill-head-80", queries=[70, 30], keys=[110, 40], heads=(4, 2), head_dim=80),
    case("prefill-head-256", queries=[20], keys=[37], heads=(1, 1), head_dim=256, block_size=1),
    case("negative-scale", **MIXED, scale=-0.7),
    case("zero-scale", **MIXED, scale=0.0),
]
