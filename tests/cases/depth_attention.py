"""Packed queries and keys: masks by position, depth, bias and window, and every head size."""

from typing import Any

import torch
from torch import Tensor

from mor.ops.depth_attention import depth_attention, reference
from tests.support.operators import OpCase, packed

NAMES = (
    "q", "k", "v", "q_positions", "k_positions", "cu_seqlens_q", "cu_seqlens_k",
    "q_depths", "k_depths", "key_bias", "causal", "scale", "window",
)  # fmt: skip
UNUSED = 2**63 - 1  # position of a cache slot that holds no key


def make_inputs(
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    *,
    queries: list[int],
    keys: list[int],
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    positions: str = "subset",
    depths: bool = False,
    bias: bool = False,
    padding: int = 0,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    """Packed sequences; the queries stand at a sorted random choice of the keys' positions.

    The bias hides the first `padding` keys of every sequence.
    """
    q_positions, k_positions = [torch.zeros(0).long()], [torch.zeros(0).long()]
    for num_queries, num_keys in zip(queries, keys, strict=True):
        key = torch.arange(num_keys) * 2 + 1
        if positions == "pairs":
            key = key // 4 * 4 + 1
        chosen = torch.randint(0, 2 * num_keys + 1, (num_queries,), generator=generator)
        if positions in ("subset", "pairs") and num_queries <= num_keys:
            chosen = key[torch.randperm(num_keys, generator=generator)[:num_queries]]
        if positions == "unused":
            key[num_keys // 2 :] = UNUSED
        if positions == "far":  # apart by more than an int64 can tell
            far = 2**62 + 2**61
            key, chosen = key - far, torch.where(chosen % 2 == 0, chosen - far, chosen + far)
        if positions == "equal":
            key, chosen = torch.zeros_like(key), torch.zeros_like(chosen)
        q_positions.append(chosen.sort().values)
        k_positions.append(key)
    num_queries, num_keys = sum(queries), sum(keys)
    total = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(num_queries, heads[0], head_dim).to(dtype),
        "k": normal(num_keys, heads[1], head_dim).to(dtype),
        "v": normal(num_keys, heads[1], head_dim).to(dtype),
        "q_positions": torch.cat(q_positions),
        "k_positions": torch.cat(k_positions),
        "cu_seqlens_q": packed(queries),
        "cu_seqlens_k": packed(keys),
        "q_depths": None,
        "k_depths": None,
        "key_bias": normal(num_keys).to(total) if bias else None,
        "causal": causal,
        "scale": scale,
        "window": window,
    }
    for start in inputs["cu_seqlens_k"][:-1].tolist() if padding else []:
        inputs["key_bias"][start : start + padding] = -torch.inf
    if depths:
        for name, count in (("q_depths", num_queries), ("k_depths", num_keys)):
            inputs[name] = torch.randint(0, 4, (count,), generator=generator, dtype=torch.int32)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def raw_args(**inputs: Any) -> tuple[Any, ...]:
    scale = inputs["q"].shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    return (*(inputs[name] for name in NAMES[:-2]), scale, inputs["window"])


def case(name: str, **options: Any) -> OpCase:
    return OpCase(
        id=name,
        op=depth_attention,
        reference=reference,
        raw=torch.ops.mor.depth_attention.default,
        opcheck=name in CHECKED,
        raw_args=raw_args,
        make=lambda dtype, device, generator: make_inputs(dtype, device, generator, **options),
        differentiable=("q", "k", "v", "key_bias") if options.get("bias") else ("q", "k", "v"),
    )


# One for each set of operands that are given.
CHECKED = ("no-rows", "ragged", "ragged-not-causal", "depths", "window-1", "window-bias-depths")
RAGGED = {"queries": [5, 0, 33, 1, 7], "keys": [9, 4, 70, 1, 0]}
BOTH = {"depths": True, "bias": True}
MANY = [1, 130, 0, 64, 65, 63, 17, 2, 200]
CASES = [
    case("no-sequences", queries=[], keys=[]),
    case("no-rows", queries=[0, 0], keys=[0, 0]),
    case("no-queries", queries=[0], keys=[3]),
    case("no-keys", queries=[3], keys=[0]),
    case("single", queries=[1], keys=[1], heads=(1, 1), head_dim=1),
    case("small-bias-depths", queries=[3, 2], keys=[4, 3], heads=(2, 1), head_dim=3, **BOTH),
    case("ragged", **RAGGED),
    case("ragged-not-causal", **RAGGED, causal=False, bias=True),
    case("gqa-4-2-head-24", **RAGGED, heads=(4, 2), head_dim=24, bias=True),
    case("gqa-9-3-head-64", queries=[65, 17], keys=[129, 40], heads=(9, 3), head_dim=64),
    case("depths", queries=[40, 9], keys=[390, 17], heads=(4, 2), depths=True),
    case("depths-bias-not-causal", **RAGGED, depths=True, bias=True, causal=False),
    case("before-any-key", queries=[40, 9], keys=[20, 3], positions="free", head_dim=17),
    case("unused-slots", queries=[1, 20], keys=[50, 64], heads=(9, 3), positions="unused"),
    case("equal-positions", queries=[19], keys=[35], positions="equal", head_dim=8),
    case("many-tiles", queries=[300], keys=[530], heads=(2, 1), head_dim=32, bias=True),
    case("rising-scores", queries=[70], keys=[600], heads=(4, 2), head_dim=32, scale=1.0),
    case("many-heads", queries=[3], keys=[40], heads=(70, 1), head_dim=16),
    case("decode", queries=[1, 1, 2], keys=[300, 33, 90], heads=(9, 3), head_dim=64, **BOTH),
    case("decode-many", queries=[1] * 9, keys=MANY, heads=(9, 3), head_dim=64, positions="unused"),
    case("decode-many-head-20", queries=[2] * 9, keys=MANY, heads=(4, 2), head_dim=20, **BOTH),
    case("head-256", queries=[20], keys=[37], heads=(1, 1), head_dim=256),
    case("head-96", queries=[70], keys=[170], heads=(3, 1), head_dim=96, depths=True),
    case("head-80", queries=[70, 9], keys=[190, 40], heads=(4, 2), head_dim=80, bias=True),
    case("head-256-many-rows", queries=[40], keys=[37], heads=(1, 1), head_dim=256),
    case("many-sequences", queries=[1, 2] * 20, keys=[3, 0, 5, 1] * 10, heads=(2, 1)),
    case("padding", queries=[20, 70], keys=[37, 130], heads=(2, 1), bias=True, padding=9),
    case("padding-alone", queries=[30], keys=[30], head_dim=64, bias=True, padding=30),
    case("head-256-bias", queries=[40], keys=[37], heads=(1, 1), head_dim=256, bias=True),
    case("negative-scale", queries=[20], keys=[37], scale=-0.7),
    case("zero-scale", queries=[20], keys=[37], scale=0.0),
    case("window-1", **RAGGED, positions="pairs", window=1),
    case("window-bias-depths", queries=[9, 3], keys=[12, 5], head_dim=3, **BOTH, window=6),
    case("window-gqa-head-24", **RAGGED, heads=(4, 2), head_dim=24, bias=True, window=9),
    case("window-larger-than-all", **RAGGED, depths=True, window=2**63 - 1),
    case("window-many-tiles", queries=[300, 40], keys=[530, 200], heads=(2, 1), **BOTH, window=90),
    case("window-of-many-tiles", queries=[300], keys=[530], heads=(2, 1), head_dim=32, window=220),
    case("window-gaps", queries=[100, 60], keys=[700, 9], heads=(3, 1), window=20, head_dim=64),
    case("window-before-any-key", queries=[40, 9], keys=[20, 3], positions="free", window=4),
    case("window-far-positions", queries=[40], keys=[20], positions="far", window=7),
    case("window-equal-positions", queries=[19], keys=[35], positions="equal", window=1),
    case("window-unused", queries=[1, 20], keys=[50, 64], positions="unused", window=17),
    case("window-decode", queries=[1] * 9, keys=MANY, heads=(9, 3), head_dim=64, window=70),
    case("window-decode-depths", queries=[2] * 9, keys=MANY, heads=(4, 2), **BOTH, window=150),
]  # fmt: skip
