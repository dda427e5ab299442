"""Rows of two sides to match: sizes around tiles, both metrics."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import bipartite_match
from mor.ops.bipartite_match import reference
from tests.support.operators import OpCase, packed

METRICS = ("cosine", "dot")
LENGTHS: dict[str, tuple[list[int], list[int]]] = {
    "no-sequences": ([], []),
    "no-rows": ([0, 0], [0, 0]),
    "single": ([1], [1]),
    "ragged": ([5, 0, 33, 17, 1], [7, 4, 0, 65, 1]),
    "tome": ([50, 49], [49, 48]),
    "tiles": ([250, 20], [131, 24]),
}


def make_inputs(
    lengths: str, width: int, values: str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    counts = LENGTHS[lengths]

    def rows(n: int) -> Tensor:
        x = torch.randn(n, width, generator=generator, dtype=torch.float64)
        if values == "integers":  # exact products: ties are ties in every dtype
            x = x.mul(2).round().clamp(-4, 4)
        if values == "equal":
            x = torch.ones_like(x)
        return x.to(dtype)

    return {
        "a": rows(sum(counts[0])),
        "b": rows(sum(counts[1])),
        "cu_seqlens_a": packed(counts[0]),
        "cu_seqlens_b": packed(counts[1]),
    }


def scores_only(**inputs: Any) -> Tensor:
    return bipartite_match(**inputs)[0]


def reference_scores(**inputs: Any) -> Tensor:
    return reference(**inputs)[0]


def case(lengths: str, width: int, metric: str, opcheck: bool = False) -> OpCase:
    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        inputs = make_inputs(lengths, width, "random", dtype, generator)
        return {name: t.to(device) for name, t in inputs.items()} | {"metric": metric}

    return OpCase(
        id=f"{lengths}-D{width}-{metric}",
        op=scores_only,
        reference=reference_scores,
        raw=torch.ops.mor.bipartite_match.default,
        opcheck=opcheck,
        make=make,
        differentiable=("a", "b"),
    )


CASES = [
    case(lengths, width, metric, opcheck=(lengths, width) == ("ragged", 5))
    for metric in METRICS
    for lengths, width in [
        ("no-sequences", 4),
        ("no-rows", 4),
        ("single", 3),
        ("single", 0),
        ("ragged", 5),
        ("ragged", 64),
        ("tome", 33),
        ("tiles", 600),
    ]
]
