"""Rows to reduce by segment: sorted and not, every reduction, with and without weights."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import segment_reduce
from mor.ops.segment_reduce import reference
from tests.support.operators import OpCase

REDUCES = ("sum", "mean", "amax")


def make_segments(n: int, num_segments: int, order: str, generator: torch.Generator) -> Tensor:
    if order == "one":
        return torch.full((n,), num_segments - 1)
    segments = torch.randint(0, max(num_segments, 1), (n,), generator=generator)
    return segments.sort().values if order == "sorted" else segments


def case(
    sizes: tuple[int, int, int],
    order: str,
    reduce: str,
    weights: str = "none",
    values: str = "random",
    opcheck: bool = False,
) -> OpCase:
    n, num_segments, width = sizes

    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(n, width, generator=generator, dtype=torch.float64)
        if values == "ties":
            x = x.round()
        weight = None
        if weights != "none":  # of one sign, as sizes are: a total near 0 has no digits
            weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
            weight = weight.float() if weights == "float32" else weight.to(dtype)
        inputs = {
            "x": x.to(dtype),
            "segments": make_segments(n, num_segments, order, generator),
            "num_segments": num_segments,
            "reduce": reduce,
            "weights": weight,
        }
        return {a: v.to(device) if isinstance(v, Tensor) else v for a, v in inputs.items()}

    return OpCase(
        id="N{}-S{}-D{}".format(*sizes) + f"-{order}-{reduce}-{values}-weights-{weights}",
        op=segment_reduce,
        reference=reference,
        raw=torch.ops.mor.segment_reduce.default,
        opcheck=opcheck,
        make=make,
        differentiable=("x",) if weights == "none" else ("x", "weights"),
        exact=reduce == "amax",
    )


SIZES = [
    (0, 0, 4),
    (0, 3, 4),
    (5, 3, 0),
    (1, 1, 1),
    (7, 7, 5),
    (33, 20, 17),
    (30, 9, 3),
    (50, 1, 65),
    (40, 90, 9),
    (300, 150, 576),
]
KINDS = [(reduce, "none") for reduce in REDUCES] + [("sum", "same"), ("mean", "same")]
CASES = (
    [case(sizes, "any", *kind, opcheck=sizes == (30, 9, 3)) for sizes in SIZES for kind in KINDS]
    + [case((33, 20, 17), order, *kind) for order in ("sorted", "one") for kind in KINDS]
    + [case((90, 11, 9), "any", "amax", values="ties")]
)
MIXED_CASES = [
    case((33, 20, 17), "any", "sum", "float32"),
    case((70, 20, 130), "sorted", "mean", "float32"),
]
