"""group_rows against nonzero for each sequence and key (the authors' form), and plain PyTorch.

The plain forms: a stable argsort with counts, eager and compiled, and nonzero for each key. A ratio
above 1 means that ours is faster.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import compiled, line, parse_args, report, wanted
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


def authors(keys: Tensor, num_keys: int, cu_seqlens: Tensor) -> list[Tensor]:
    """Rows of each key in each sequence, one nonzero for each pair."""
    batch = keys.view(cu_seqlens.numel() - 1, -1)
    return [torch.where(row == key)[0] for key in range(num_keys) for row in batch]


def measure(n: int, num_sequences: int, num_keys: int, kind: str) -> None:
    what = {"N": n, "B": num_sequences, "keys": num_keys, "input": kind}
    if not wanted(what):
        return
    keys = torch.randint(0, num_keys, (n,))
    given = {"random": keys, "equal": torch.zeros_like(keys), "bool": keys.bool()}[kind]
    cu_seqlens = torch.arange(0, n + 1, n // num_sequences, dtype=torch.int32)
    compiled_argsort = compiled(argsort)
    forms: dict[str, Callable[..., Any]] = {
        "ours": group_rows,
        "argsort": argsort,
        "compiled argsort": compiled_argsort,
        "nonzero": nonzero,
    }
    calls = {name: lambda f=f: f(given, num_keys, cu_seqlens) for name, f in forms.items()}
    want = group_rows(given, num_keys, cu_seqlens)
    for call in calls.values():
        for got, expected in zip(call(), want, strict=True):
            assert torch.equal(got, expected)
    calls["authors"] = lambda: authors(given, num_keys, cu_seqlens)
    starts = cu_seqlens[:-1].repeat(num_keys)
    found = [rows + start for rows, start in zip(calls["authors"](), starts, strict=True)]
    assert torch.equal(torch.cat(found), want[0])
    calls["limit argsort"] = lambda: torch.argsort(given, stable=True)
    with torch.inference_mode():
        line(what, calls)


if __name__ == "__main__":
    args = parse_args(__doc__)
    torch.manual_seed(0)
    for case in [(64, 2, 2)] if args.smoke else CASES:
        for kind in ("random", "equal", "bool") if case[2] == 2 else ("random", "equal"):
            measure(*case, kind)
    report("group_rows")
