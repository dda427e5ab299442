"""route_topk against the MoR authors' chain (topk, sort, gather), compiled too, and torch.topk."""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleave, parse_args, report
from torch import Tensor

from mor.ops import route_topk

SHAPES = [(8, 2048), (32, 2048), (1, 32768), (8, 1024)]
INPUTS: dict[str, Callable[[int], Tensor]] = {
    "random": torch.randn,
    "equal": torch.ones,
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    # Half the rows are 0.5, the others differ from it in one bit each.
    "adversarial": lambda n: (
        torch.where(torch.arange(n) % 2 == 0, 0x3F000000, 0x3F000000 ^ 1 << torch.arange(n) % 23)
        .int()
        .view(torch.float32)
    ),
}


def authors(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, rows = torch.topk(scores, k, dim=-1, sorted=False)
    rows, order = torch.sort(rows, dim=-1)
    return rows, torch.gather(values, -1, order)


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, k, dim=-1, sorted=False)


def measure(shape: tuple[int, int], dtype: torch.dtype, args: Any) -> list[dict[str, Any]]:
    num_sequences, length = shape
    k, n = length // 2, num_sequences * length
    cu_seqlens = torch.arange(0, n + 1, length, dtype=torch.int32)
    inputs = {name: make(n).to(dtype) for name, make in INPUTS.items()}
    scores = inputs["random"].float().view(shape)
    # Distinct scores: the chain's ties are arbitrary.
    distinct = scores.argsort(-1).argsort(-1).float()
    rows = authors(distinct, k)[0] + cu_seqlens[:-1, None]
    assert torch.equal(route_topk(distinct.flatten(), k, cu_seqlens), rows.flatten())

    scores = inputs["random"].view(shape)
    compiled = torch.compile(authors, dynamic=False)
    candidates: dict[str, Callable[[], Any]] = {
        name: lambda s=s: route_topk(s, k, cu_seqlens) for name, s in inputs.items()
    }
    candidates["topk alone"] = lambda: topk(scores, k)
    candidates["authors"] = lambda: authors(scores, k)
    candidates["authors compiled"] = lambda: compiled(scores, k)
    seconds = interleave(candidates, args.repeats)
    mine = seconds["random"]
    return [
        {
            "shape": f"{num_sequences}x{length}",
            "dtype": str(dtype).removeprefix("torch."),
            "case": f"mor, {name}" if name in INPUTS else name,
            "us": time * 1e6,
            "time / mor, random": time / mine,
        }
        for name, time in seconds.items()
    ]


def main() -> None:
    args = parse_args(__doc__ or "")
    shapes = [(2, 64)] if args.smoke else SHAPES
    if args.smoke:
        args.repeats = 1
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    rows = [row for shape in shapes for dtype in dtypes for row in measure(shape, dtype, args)]
    report("route_topk", rows, args)


if __name__ == "__main__":
    main()
