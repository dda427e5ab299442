"""route_threshold against the plain forms, eager and compiled.

absolute: a mask, nonzero and the counts; quantile: torch.quantile and the same; mass: sort, cumsum
and a scatter back (top-p). A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import parse_args, report
from routed import compiled, line
from torch import Tensor

from mor.ops import route_threshold

SHAPES = [(8, 2048), (1, 32768), (2048, 8)]
DTYPES = (torch.float32, torch.bfloat16)
THRESHOLDS = {"absolute": 0.001, "quantile": 0.5, "mass": 0.5}


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


def measure(shape: tuple[int, int], dtype: torch.dtype, kind: str, repeats: int) -> dict[str, Any]:
    num_sequences, length = shape
    threshold, form = THRESHOLDS[kind], FORMS[kind]
    threshold = 1 / length if kind == "absolute" else threshold
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    scores = scores.to(dtype)
    packed = scores.flatten()
    cu_seqlens = torch.arange(0, packed.numel() + 1, length, dtype=torch.int32)
    faster = compiled(form)  # nonzero stays outside: its size is no business of a graph
    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: route_threshold(packed, threshold, cu_seqlens, kind=kind),
        "eager": lambda: rows_and_counts(form(scores, threshold)),
        "compiled": lambda: rows_and_counts(faster(scores, threshold)),
        "limit topk": lambda: torch.topk(scores, max(length // 2, 1), dim=1, sorted=False),
    }
    got, want = candidates["ours"](), candidates["eager"]()
    if kind != "mass":  # whose cumsum in float32 may be a row off
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1][1:], want[1])
    what = {"shape": f"{num_sequences}x{length}", "dtype": str(dtype).removeprefix("torch.")}
    with torch.inference_mode():
        row = line({**what, "kind": kind, "rows": got[0].numel()}, candidates, repeats)
    return row


def main() -> None:
    args = parse_args(__doc__)
    shapes = [(2, 64)] if args.smoke else SHAPES
    rows = [measure(s, d, k, args.repeats) for s in shapes for d in DTYPES for k in FORMS]
    report("route_threshold", rows, args)


if __name__ == "__main__":
    main()
