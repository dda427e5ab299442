"""What the benchmarks of gather, scatter and their round trip share: shapes, inputs, one line."""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleave
from torch import Tensor

#: B, S, D; every sequence keeps S / 2 tokens.
SHAPES = {"small": (8, 1024, 576), "large": (8, 2048, 960), "smoke": (2, 32, 65)}
DTYPES = (torch.float32, torch.bfloat16)


def ascending_rows(batch: int, length: int, k: int) -> Tensor:
    """Random k rows of every sequence, ascending, as route_topk returns them: [B, k] in [0, S)."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(batch, length, generator=generator).topk(k, dim=1).indices
    return chosen.sort(dim=1).values


def packed(rows: Tensor, length: int) -> Tensor:
    """Rows of [B, S, D] as rows of [B * S, D]."""
    return (rows + torch.arange(rows.shape[0])[:, None] * length).flatten()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, afresh for every shape and dtype as a user's static model would."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def line(
    what: dict[str, Any],
    candidates: dict[str, Callable[[], Any]],
    repeats: int,
    seconds: float = 0.05,
) -> dict[str, Any]:
    """One line of the table: `ours` against `authors` and against the best of the plain forms.

    Names starting with "limit" are shown and are not peers.
    """
    times = interleave(candidates, repeats, seconds)
    ours = times.pop("ours")
    limits = {name: times.pop(name) for name in [*times] if name.startswith("limit")}
    plain = {name: seconds for name, seconds in times.items() if name != "authors"}
    best = min(plain, key=plain.__getitem__)
    row = {**what, "ours ms": ours * 1e3}
    if "authors" in times:
        row |= {"authors ms": times["authors"] * 1e3, "x authors": times["authors"] / ours}
    row |= {"best ms": plain[best] * 1e3, "x best": plain[best] / ours, "best": best}
    return row | {f"x {name}": value / ours for name, value in limits.items()}
