"""Scores to choose the best of: values, lengths, counts and masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.ops import route_topk
from mor.ops.route_topk import reference
from tests.support.operators import OpCase, packed

SPECIAL = torch.tensor(
    [0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-40, 5e-324, 1.0], dtype=torch.float64
)
VALUES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
    "tiny": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64) * 1e-39,
    "ties": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).round(),
    "equal": lambda n, g: torch.full((n,), -0.25, dtype=torch.float64),
    "rising": lambda n, g: torch.arange(n, dtype=torch.float64) - n // 2,
    "falling": lambda n, g: n // 2 - torch.arange(n, dtype=torch.float64),
    "special": lambda n, g: SPECIAL[torch.randint(0, len(SPECIAL), (n,), generator=g)],
    # Close to one another: the order is in the lowest bits.
    "close": lambda n, g: 1 + torch.randint(0, 99, (n,), generator=g, dtype=torch.float64) * 2e-7,
}  # fmt: skip
LENGTHS = {
    "no-sequences": [],
    "no-rows": [0, 0],
    "single": [1],
    "ragged": [5, 0, 63, 64, 65, 1, 130, 0],
    "long": [2048, 1000],
    "threads": [9000, 20000, 3, 8000],
}
K = {
    "none": lambda available: 0,
    "all": lambda available: available,
    "half": lambda available: (available + 1) // 2,
    "one": lambda available: min(available, 1),
    "all-but-one": lambda available: max(available - 1, 0),
}
MASKS = ("", "candidates", "protected_rows", "both")


def case(lengths: str, values: str, k: str, masks: str = "", by_score: bool = False) -> OpCase:
    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        n = sum(LENGTHS[lengths])
        inputs: dict[str, Any] = {
            "scores": VALUES[values](n, generator).to(dtype),
            "candidates": None,
            "protected_rows": None,
            "cu_seqlens": packed(LENGTHS[lengths]),
            "by_score": by_score,
        }
        competes = torch.ones(n, dtype=torch.bool)
        if masks in ("candidates", "both"):
            competes = inputs["candidates"] = torch.rand(n, generator=generator) < 0.6
        if masks in ("protected_rows", "both"):
            inputs["protected_rows"] = torch.rand(n, generator=generator) < 0.1
            competes = competes & ~inputs["protected_rows"]
        available = [int(part.sum()) for part in competes.split(LENGTHS[lengths])]
        inputs["k"] = torch.tensor([K[k](a) for a in available], dtype=torch.int64)
        return {a: v.to(device) if isinstance(v, Tensor) else v for a, v in inputs.items()}

    def raw_args(
        scores: Tensor,
        k: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None,
        protected_rows: Tensor | None,
        by_score: bool,
    ) -> tuple[Any, ...]:
        kept = 0 if protected_rows is None else int(protected_rows.sum())
        num_rows = int(k.sum()) + kept
        return scores, 0, k, cu_seqlens, num_rows, candidates, protected_rows, by_score

    return OpCase(
        id="-".join(filter(None, (lengths, values, k, masks, "by-score" if by_score else ""))),
        op=route_topk,
        reference=reference,
        raw=torch.ops.mor.route_topk.default,
        opcheck=values == "random" and bool(masks),
        raw_args=raw_args,
        make=make,
        exact=True,
    )


CASES = (
    [case(lengths, "random", "half") for lengths in LENGTHS]
    + [case("ragged", values, "half") for values in VALUES]
    + [case("ragged", "ties", k) for k in K]
    + [
        case("ragged", values, "half", masks, by_score)
        for masks in MASKS
        for values in ("random", "special")
        for by_score in (False, True)
    ]
    + [case("long", "close", "half", "both"), case("no-rows", "random", "none", "both", True)]
    + [case("threads", "ties", "half", masks, masks == "both") for masks in MASKS]
)
