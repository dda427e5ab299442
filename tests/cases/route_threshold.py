"""Thresholds, quantiles and masses over the scores of route_topk, with bounds and masks."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import route_threshold
from mor.ops.route_threshold import reference
from tests.cases.route_topk import LENGTHS, VALUES
from tests.support.operators import OpCase, packed

RULES: dict[str, dict[str, Any]] = {
    "absolute": {"threshold": 0.25},
    "absolute-inclusive": {"threshold": -0.25, "inclusive": True},
    "absolute-each": {"threshold": "each"},
    "quantile": {"kind": "quantile", "threshold": 0.7},
    "quantile-inclusive": {"kind": "quantile", "threshold": 0.3, "inclusive": True},
    "quantile-lowest": {"kind": "quantile", "threshold": 0.0},
    "quantile-each": {"kind": "quantile", "threshold": "each"},
    "mass": {"kind": "mass", "threshold": 0.6},
    "mass-all": {"kind": "mass", "threshold": 1.0},
    "mass-each": {"kind": "mass", "threshold": "each"},
}
BOUNDS: dict[str, dict[str, int]] = {
    "free": {},
    "at-least": {"min_k": 40},
    "at-most": {"max_k": 9},
    "between": {"min_k": 20, "max_k": 30},
    "fixed": {"min_k": 3, "max_k": 3},
    "none": {"max_k": 0},
}


def case(
    lengths: str,
    values: str,
    rule: str,
    bounds: str = "free",
    masked: bool = False,
    max_rows: int | None = None,
) -> OpCase:
    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        n = sum(LENGTHS[lengths])
        scores = VALUES[values](n, generator)
        if RULES[rule].get("kind") == "mass":
            scores = scores.abs().nan_to_num(posinf=7.0)
        inputs: dict[str, Any] = {
            "scores": scores.to(dtype),
            "cu_seqlens": packed(LENGTHS[lengths]),
            "candidates": torch.rand(n, generator=generator) < 0.6 if masked else None,
            "max_rows": max_rows,
            **RULES[rule],
            **BOUNDS[bounds],
        }
        if inputs["threshold"] == "each":
            inputs["threshold"] = torch.rand(len(LENGTHS[lengths]), generator=generator).double()
        return {a: v.to(device) if isinstance(v, Tensor) else v for a, v in inputs.items()}

    return OpCase(
        id="-".join(filter(None, (lengths, values, rule, bounds, "masked" if masked else ""))),
        op=route_threshold,
        reference=reference,
        make=make,
        exact=True,
    )


#: One rule of each kind; the others change the comparison alone, and each of them stands below.
KINDS = ("absolute", "quantile", "mass")
CASES = (
    [case(lengths, "random", rule) for lengths in LENGTHS for rule in KINDS]
    + [case("ragged", values, rule) for values in VALUES for rule in KINDS]
    + [case("ragged", "ties", rule, bounds) for rule in KINDS for bounds in BOUNDS]
    + [case("ragged", "random", rule, "between", True) for rule in RULES]
    + [case("ragged", "random", rule, "at-most", True, 100) for rule in KINDS]
    + [case("long", "close", rule, masked=True) for rule in RULES]
)
