"""kv_append against torch.cat (the authors' form), index_copy_ and indexing, as caches grow.

`cat` is what Transformers' DynamicCache and the authors do: it writes the whole cache anew. The
last line is a prefill. `x limit copy_` stands against a copy of the rows to the cache's beginning.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor

from mor.ops import kv_append

KV_HEADS, HEAD_DIM, BLOCK = 3, 64, 16
#: Sequences, tokens of each in the cache, new tokens of each.
SHAPES = ((32, 512, 1), (32, 8192, 1), (4, 0, 512))


def index_copy(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


def indexing(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, context, new = shape
    what = {"sequences": batch, "context": context, "new": new, "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    random, blocks = generator(), -(-(context + new) // BLOCK)
    cache_shape = (batch * blocks, BLOCK, KV_HEADS, HEAD_DIM)
    caches = tuple(torch.zeros(cache_shape, dtype=dtype) for _ in "kv")
    rows = tuple(
        torch.randn(batch * new, KV_HEADS, HEAD_DIM, generator=random).to(dtype) for _ in "kv"
    )
    table = torch.randperm(batch * blocks, generator=random).view(batch, blocks)
    positions = torch.arange(context, context + new)
    slots = (table[:, positions // BLOCK] * BLOCK + positions % BLOCK).flatten()
    forms = {"ours": kv_append, "index_copy_": index_copy, "indexing": indexing}
    forms["compiled indexing"] = compiled(indexing)
    calls: dict[str, Any] = {n: partial(f, *caches, *rows, slots) for n, f in forms.items()}
    old = [torch.zeros(batch, KV_HEADS, context, HEAD_DIM, dtype=dtype) for _ in "kv"]
    split = [t.unflatten(0, (batch, new)).transpose(1, 2) for t in rows]
    flat = [t.flatten(0, 1) for t in caches]
    with torch.inference_mode():
        for name, call in calls.items():
            for cache in caches:
                cache.zero_()
            call()
            for cache, t in zip(flat, rows, strict=True):
                assert torch.equal(cache[slots], t), name
        calls["authors"] = lambda: [torch.cat(pair, 2) for pair in zip(old, split, strict=True)]
        calls["limit copy_"] = lambda: [
            cache[: len(t)].copy_(t) for cache, t in zip(flat, rows, strict=True)
        ]
        line(what, calls)


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product([(2, 32, 1)] if args.smoke else SHAPES, DTYPES):
        measure(*what)
    report("kv_append")
