"""Rows to gather: ascending, unsorted and repeated, of every width."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import gather_tokens
from mor.ops.gather_tokens import reference
from tests.support.operators import OpCase


def make_rows(num_rows: int, num_taken: int, order: str, generator: torch.Generator) -> Tensor:
    if order in ("repeated", "falling-repeats"):
        rows = torch.randint(0, max(num_rows, 1), (num_taken,), generator=generator)
        return rows.sort().values if order == "repeated" else rows
    rows = torch.randperm(num_rows, generator=generator)[:num_taken]
    return rows.sort().values if order == "ascending" else rows


def case(num_rows: int, num_taken: int, width: int, order: str, opcheck: bool = False) -> OpCase:
    def make(dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
        rows = make_rows(num_rows, num_taken, order, generator)
        return {"x": x.to(device, dtype), "rows": rows.to(device)}

    return OpCase(
        id=f"N{num_rows}-K{num_taken}-D{width}-{order}",
        op=gather_tokens,
        reference=reference,
        raw=torch.ops.mor.gather_tokens.default,
        opcheck=opcheck,
        make=make,
        differentiable=("x",),
        exact=True,
    )


CASES = [
    case(0, 0, 4, "ascending"),
    case(5, 0, 4, "ascending", opcheck=True),
    case(5, 3, 0, "ascending"),
    case(1, 1, 1, "ascending"),
    case(7, 7, 5, "ascending", opcheck=True),
    case(33, 20, 17, "ascending"),
    case(33, 20, 17, "unsorted"),
    case(9, 30, 3, "repeated"),
    case(9, 30, 3, "falling-repeats", opcheck=True),
    case(1, 50, 65, "falling-repeats"),
    case(40, 39, 9, "falling-repeats"),
    case(300, 150, 576, "ascending"),
    case(300, 150, 576, "falling-repeats"),
    case(200, 67, 960, "unsorted"),
]
