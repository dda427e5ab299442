"""route_topk against the MoR authors' chain (topk, sort, gather of the gates) and torch.topk alone.

`rows` is the choice alone, in ascending order; `rows, gates` also takes the chosen scores, as the
authors' chain does. Sorted, tied and adversarial inputs stand against our own time on random ones
too: `x limit random` must stay above 0.5. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, line, parse_args, report, wanted
from torch import Tensor

from mor.ops import gather_tokens, route_topk

SHAPES = [(8, 2048), (32, 2048), (1, 32768)]
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


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, k, dim=-1, sorted=False)


def chain(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, rows = topk(scores, k)
    rows, order = torch.sort(rows, dim=-1)
    return rows, torch.gather(values, -1, order)


def topk_sort(scores: Tensor, k: int) -> Tensor:
    return topk(scores, k)[1].sort(dim=-1).values


def topk_mask(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, topk(scores, k)[1], True)
    return mask.nonzero()[:, 1].view(len(scores), k)


def measure(shape: tuple[int, int], dtype: torch.dtype, kind: str, gates: bool) -> None:
    num_sequences, length = shape
    what = {"shape": f"{num_sequences}x{length}", "dtype": dtype_name(dtype), "input": kind}
    what["result"] = "rows, gates" if gates else "rows"
    if not wanted(what):
        return
    k, n = length // 2, num_sequences * length
    cu_seqlens = torch.arange(0, n + 1, length, dtype=torch.int32)
    scores, random = (INPUTS[name](n).to(dtype).view(shape) for name in (kind, "random"))

    def ours(scores: Tensor) -> Any:
        rows = route_topk(scores.view(-1), k, cu_seqlens)
        return (rows, gather_tokens(scores.view(-1), rows)) if gates else rows

    forms: dict[str, Callable[[Tensor], Any]] = {"ours": ours}
    if gates:
        compiled_chain = compiled(chain)
        forms |= {"authors": lambda s: chain(s, k), "compiled": lambda s: compiled_chain(s, k)}
        forms["mask"] = lambda s: ((rows := topk_mask(s, k)), s.gather(1, rows))
    else:
        compiled_sort = compiled(topk_sort)
        forms["sort"] = lambda s: topk_sort(s, k)
        forms["mask"] = lambda s: topk_mask(s, k)
        forms["compiled sort"] = lambda s: compiled_sort(s, k)
    distinct = torch.randn(shape).argsort(-1).float()  # PyTorch breaks ties as it likes
    want = (topk_sort(distinct, k) + cu_seqlens[:-1, None]).flatten()
    got = ours(distinct)
    assert torch.equal(got[0] if gates else got, want)
    candidates = {name: lambda form=form: form(scores) for name, form in forms.items()}
    candidates["limit topk"] = lambda: topk(scores, k)
    if kind != "random":
        candidates["limit random"] = lambda: ours(random)
    with torch.inference_mode():
        line(what, candidates)


if __name__ == "__main__":
    args = parse_args(__doc__)
    torch.manual_seed(0)
    for what in product([(2, 64)] if args.smoke else SHAPES, DTYPES):
        measure(*what, "random", gates=True)
        for kind in INPUTS:
            measure(*what, kind, gates=False)
    report("route_topk")
