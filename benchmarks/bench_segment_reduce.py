"""segment_reduce against scatter_reduce (ToMe's form), index_add, index_reduce, segment_reduce.

Half as many segments as rows, in random order, as in token merging. A ratio above 1 means that ours
is faster.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from routed import both_ways
from torch import Tensor

from mor.ops import segment_reduce

#: N, D: 8 images of 1024 tokens, and 4 of 4096.
SHAPES = {"small": (8 * 1024, 320), "large": (4 * 4096, 640), "smoke": (64, 65)}
KINDS = ("sum", "mean", "weighted mean", "amax")
Form = Callable[[Tensor, Tensor], Tensor]


def forms(segments: Tensor, num_segments: int, reduce: str) -> dict[str, Form]:
    order = segments.argsort(stable=True)
    lengths = torch.bincount(segments, minlength=num_segments)

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(num_segments, x.shape[1])

    def authors(x: Tensor, weights: Tensor) -> Tensor:
        expanded = segments[:, None].expand(-1, x.shape[1])
        return zeros(x).scatter_reduce(0, expanded, x, reduce, include_self=False)

    def weighted_authors(x: Tensor, weights: Tensor) -> Tensor:
        expanded = segments[:, None].expand(-1, x.shape[1])
        total = weights.new_zeros(num_segments).scatter_reduce(0, segments, weights, "sum")
        merged = zeros(x).scatter_reduce(0, expanded, x * weights[:, None], "sum")
        return merged / total[:, None].clamp(min=1e-6)

    def index_add(x: Tensor, weights: Tensor) -> Tensor:
        total = zeros(x).index_add(0, segments, x)
        return total if reduce == "sum" else total / lengths[:, None].clamp(min=1)

    def weighted_index_add(x: Tensor, weights: Tensor) -> Tensor:
        total = weights.new_zeros(num_segments).index_add(0, segments, weights)
        merged = zeros(x).index_add(0, segments, x * weights[:, None])
        return merged / total[:, None].clamp(min=1e-6)

    def index_reduce(x: Tensor, weights: Tensor) -> Tensor:
        return zeros(x).index_reduce(0, segments, x, "amax", include_self=False)

    def sorted_reduce(x: Tensor, weights: Tensor) -> Tensor:
        return torch.segment_reduce(x[order], "sum", lengths=lengths, axis=0)

    if reduce == "weighted mean":
        return {
            "ours": lambda x, weights: segment_reduce(x, segments, num_segments, "mean", weights),
            "authors": weighted_authors,
            "index_add": weighted_index_add,
            "compiled index_add": compiled(weighted_index_add),
        }
    plain = index_reduce if reduce == "amax" else index_add
    named: dict[str, Form] = {
        "ours": lambda x, weights: segment_reduce(x, segments, num_segments, reduce),
        "authors": authors,
        plain.__name__: plain,
        f"compiled {plain.__name__}": compiled(plain),
    }
    if reduce == "sum":  # it has no mean and no maximum of empty segments
        named["sorted segment_reduce"] = sorted_reduce
    return named


def measure(size: str, dtype: torch.dtype, reduce: str) -> None:
    shape = SHAPES[size]
    what = {"shape": str(list(shape)), "dtype": dtype_name(dtype), "what": reduce}
    whats = [{**what, "pass": name} for name in ("forward", "forward + backward")]
    if not any(map(wanted, whats)):
        return
    (n, width), random = shape, generator()
    x = torch.randn(n, width, generator=random).to(dtype)
    weights = torch.randint(1, 5, (n,), generator=random).to(dtype)
    segments = torch.randint(0, n // 2, (n,), generator=random)
    named = forms(segments, n // 2, reduce)
    with torch.inference_mode():
        want = named["ours"](x, weights)
        near = 1e-5 if dtype == torch.float32 else 0.1  # the others round after every row
        for form in named.values():
            torch.testing.assert_close(form(x, weights), want, rtol=near, atol=near)
        calls = {name: partial(form, x, weights) for name, form in named.items()}
        calls["limit clone"] = x.clone
        line(whats[0], calls)
    line(whats[1], both_ways(named, (x.requires_grad_(), weights), torch.randn_like(x[: n // 2])))


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product(["smoke"] if args.smoke else ["small", "large"], DTYPES, KINDS):
        measure(*what)
    report("segment_reduce")
