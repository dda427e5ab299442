"""group_rows against plain PyTorch: a stable argsort with counts, and nonzero for each key."""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleave, parse_args, report
from torch import Tensor

from mor.ops import group_rows

CASES = [(16384, 8, 2), (32768, 16, 2), (32768, 64, 2), (32768, 16, 4), (32768, 16, 64)]


def argsort(keys: Tensor, num_keys: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by a stable sort, offsets by counting (key, sequence) pairs."""
    num_sequences = cu_seqlens.numel() - 1
    rows = torch.argsort(keys, stable=True)
    row = torch.arange(keys.numel())
    sequences = torch.bucketize(row, cu_seqlens[1:], right=True)
    counts = torch.bincount(keys * num_sequences + sequences, minlength=num_keys * num_sequences)
    return rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def nonzero(keys: Tensor, num_keys: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each key by nonzero, offsets by finding the sequence starts among them."""
    rows = [(keys == key).nonzero().squeeze(1) for key in range(num_keys)]
    starts, offsets = 0, []
    for found in rows:
        offsets.append(torch.searchsorted(found, cu_seqlens[:-1].long()) + starts)
        starts += found.numel()
    return torch.cat(rows), torch.cat([*offsets, torch.tensor([starts])])


def measure(n: int, num_sequences: int, num_keys: int, args: Any) -> list[dict[str, Any]]:
    keys = torch.randint(0, num_keys, (n,))
    cu_seqlens = torch.arange(0, n + 1, n // num_sequences, dtype=torch.int32)
    inputs = (keys, num_keys, cu_seqlens)
    equal, flags = torch.zeros_like(keys), keys.bool()
    compiled = torch.compile(argsort, dynamic=False)
    candidates: dict[str, Callable[[], Any]] = {
        "mor": lambda: group_rows(*inputs),
        "mor, equal keys": lambda: group_rows(equal, num_keys, cu_seqlens),
        "argsort": lambda: argsort(*inputs),
        "argsort compiled": lambda: compiled(*inputs),
        "argsort alone": lambda: torch.argsort(keys, stable=True),
        "nonzero": lambda: nonzero(*inputs),
    }
    if num_keys == 2:
        candidates["mor, bool"] = lambda: group_rows(flags, num_keys, cu_seqlens)
    for other in (argsort, compiled, nonzero):
        for got, want in zip(group_rows(*inputs), other(*inputs), strict=True):
            assert torch.equal(got, want)
    seconds = interleave(candidates, args.repeats)
    return [
        {
            "N": n,
            "B": num_sequences,
            "keys": num_keys,
            "case": name,
            "us": time * 1e6,
            "time / mor": time / seconds["mor"],
        }
        for name, time in seconds.items()
    ]


def main() -> None:
    args = parse_args(__doc__ or "")
    cases = [(64, 2, 2)] if args.smoke else CASES
    if args.smoke:
        args.repeats = 1
    torch.manual_seed(0)
    report("group_rows", [row for case in cases for row in measure(*case, args)], args)


if __name__ == "__main__":
    main()
