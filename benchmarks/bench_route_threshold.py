"""route_threshold against nonzero for each sequence (the authors' form), and plain PyTorch.

The plain forms: a mask, nonzero and the counts (absolute), torch.quantile and the same (quantile),
sort, cumsum and a scatter back (mass: top-p); eager and compiled. A ratio above 1 means that ours
is faster.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor

from mor.ops import route_threshold

SHAPES = [(8, 2048), (1, 32768), (2048, 8)]


def rows_and_counts(chosen: Tensor) -> tuple[Tensor, Tensor]:
    counts = chosen.sum(1, dtype=torch.int32)
    return chosen.flatten().nonzero()[:, 0], counts.cumsum(0, dtype=torch.int32)


def absolute(scores: Tensor, threshold: float) -> Tensor:
    return scores > threshold


def quantile(scores: Tensor, threshold: float) -> Tensor:
    scores = scores.float()
    return scores > torch.quantile(scores, threshold, dim=1, keepdim=True)


def mass(scores: Tensor, threshold: float) -> Tensor:
    weights, order = scores.float().sort(dim=1, stable=True, descending=True)
    before = weights.cumsum(1) - weights
    needed = before < threshold * weights.sum(1, keepdim=True)
    return torch.zeros_like(needed).scatter(1, order, needed)


FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "absolute": absolute,
    "quantile": quantile,
    "mass": mass,
}


def measure(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    num_sequences, length = shape
    what = {"shape": f"{num_sequences}x{length}", "dtype": dtype_name(dtype), "kind": kind}
    if not wanted(what):
        return
    threshold = 1 / length if kind == "absolute" else 0.5
    form = FORMS[kind]
    scores = torch.randn(shape, generator=generator()).mul(2).softmax(-1)
    scores = scores.to(dtype)
    packed = scores.flatten()
    cu_seqlens = torch.arange(0, packed.numel() + 1, length, dtype=torch.int32)
    faster = compiled(form)  # nonzero stays outside: its size is no business of a graph
    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: route_threshold(packed, threshold, cu_seqlens, kind=kind),
        "authors": lambda: [torch.where(row)[0] for row in form(scores, threshold)],
        "eager": lambda: rows_and_counts(form(scores, threshold)),
        "compiled": lambda: rows_and_counts(faster(scores, threshold)),
        "limit topk": lambda: torch.topk(scores, max(length // 2, 1), dim=1, sorted=False),
    }
    got, want = candidates["ours"](), candidates["eager"]()
    if kind != "mass":  # whose cumsum in float32 may be a row off
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1][1:], want[1])
    with torch.inference_mode():
        line(what, candidates)


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product([(2, 64)] if args.smoke else SHAPES, DTYPES, FORMS):
        measure(*what)
    report("route_threshold")
