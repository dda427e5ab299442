"""Choose the best half of the tokens, take them, add them back gated.

This is the whole detour of one recursion step around its block, forward.
The block itself is left out: the tokens taken are returned, as its input, and its output is a
given tensor, so this is routing alone and nothing of it can be optimised away. Peers choose with
topk, put the choice in ascending order (attention needs it) by a sort or by a mask, and add with
index_add or, as no row repeats, with index_copy; eager and compiled. In place against in place, a
new tensor against a new tensor. A ratio above 1 means that ours is faster. `x limit copy_` stands
against one copy_ of contiguous rows that moves as many bytes as gather and scatter read and write:
a yardstick, not a bound, for they read more than they write and may find rows in the cache.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from harness import DTYPES, compiled, dtype_name, line, parse_args, report, wanted
from routed import SHAPES
from torch import Tensor

from mor.ops import gather_tokens, route_topk, scatter_tokens, scatter_tokens_

# hidden [N, D], scores [N], updates [K, D] -> hidden with the updates, tokens taken [K, D]
Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(shape: tuple[int, int, int], k: int, in_place: bool) -> Form:
    cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32) * shape[1]
    scatter = scatter_tokens_ if in_place else scatter_tokens

    def round_trip(hidden: Tensor, scores: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
        rows = route_topk(scores, k, cu_seqlens)
        x = gather_tokens(hidden, rows)
        return scatter(hidden, updates, rows, gather_tokens(scores, rows)), x

    return round_trip


def authors(shape: tuple[int, int, int], k: int) -> Form:
    batch, length, width = shape

    def round_trip(hidden: Tensor, scores: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(scores.view(batch, length), k, dim=1, sorted=False)
        chosen, order = torch.sort(chosen, dim=1)
        weights = torch.gather(weights, 1, order)
        expanded = chosen[:, :, None].expand(-1, -1, width)
        x = torch.gather(hidden.view(shape), 1, expanded)
        gated = updates.view(x.shape) * weights[:, :, None].to(x.dtype)
        out = torch.scatter_add(hidden.view(shape), 1, expanded, gated)
        return out.view(-1, width), x.view(-1, width)

    return round_trip


def plain(shape: tuple[int, int, int], k: int, in_place: bool, order: str, add: str) -> Form:
    batch, length, _ = shape
    offsets = torch.arange(batch)[:, None] * length

    def round_trip(hidden: Tensor, scores: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.topk(scores.view(batch, length), k, dim=1, sorted=False).indices
        if order == "sort":
            rows = (chosen.sort(dim=1).values + offsets).flatten()
        else:
            mask = torch.zeros(batch, length, dtype=torch.bool).scatter_(1, chosen, True)
            rows = mask.flatten().nonzero().flatten()
        x = torch.index_select(hidden, 0, rows)
        gate = scores[rows, None].to(x.dtype)
        if add == "index_add":
            add_rows = hidden.index_add_ if in_place else hidden.index_add
            return add_rows(0, rows, updates * gate), x
        copy_rows = hidden.index_copy_ if in_place else hidden.index_copy
        return copy_rows(0, rows, torch.addcmul(x, updates, gate)), x

    return round_trip


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    k, what = shape[1] // 2, {"shape": str(list(shape)), "dtype": dtype_name(dtype)}
    hidden = torch.randn(shape[0] * shape[1], shape[2]).to(dtype)
    scores = torch.rand(shape[0] * shape[1])
    updates = torch.randn(shape[0] * k, shape[2]).to(dtype)
    small = scores * 1e-4  # hundreds of runs in place stay finite
    for in_place in (True, False):
        described = {**what, "form": "in place" if in_place else "new tensor"}
        if not wanted(described):
            continue
        forms = {"ours": ours(shape, k, in_place), "authors": authors(shape, k)}
        for add in ("index_add", "index_copy"):
            for order in ("sort", "mask"):
                forms[f"{order}, {add}"] = plain(shape, k, in_place, order, add)
            forms[f"compiled sort, {add}"] = compiled(plain(shape, k, in_place, "sort", add))
        with torch.inference_mode():
            want = forms["ours"](hidden.clone(), scores, updates)
            for form in forms.values():
                for a, b in zip(form(hidden.clone(), scores, updates), want, strict=True):
                    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
            candidates = {n: partial(form, hidden, small, updates) for n, form in forms.items()}
            # Rows moved. Gather: k read, k written; scatter: k updates, the base, the result.
            rows = 3 * len(updates) + 2 * (len(updates) if in_place else len(hidden))
            source = torch.randn(rows // 2, shape[2]).to(dtype)
            candidates["limit copy_"] = partial(torch.empty_like(source).copy_, source)
            line(described, candidates)


if __name__ == "__main__":
    args = parse_args(__doc__)
    shapes = [SHAPES["smoke"]]
    if not args.smoke:
        shapes = [(8, 2048, 576), SHAPES["small"], SHAPES["large"]]
    for what in product(shapes, DTYPES):
        measure(*what)
    report("round_trip")
