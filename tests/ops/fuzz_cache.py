"""kv_append, kv_gather and paged_depth_attention, as fuzz_operators.py lists them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from fuzz_attention import HEAD_DIMS, HEADS, falling, magnitudes
from fuzzing import (
    COUNTS,
    FLOATING,
    WIDTHS,
    Draw,
    Inputs,
    Operator,
    broken_cu_seqlens,
    changed,
    restored,
)
from torch import Tensor

from mor.ops import kv_append, kv_gather, paged_depth_attention
from mor.ops.kv_append import reference as append_reference
from mor.ops.kv_gather import reference as gather_reference
from mor.ops.paged_depth_attention import reference as paged_reference
from tests.support.operators import packed

Break = Callable[[Draw, Inputs], Inputs | None]
WILD = (-1, 2**31 - 1, -(2**31))  # block numbers and lengths that are none
BLOCK_SIZES = (1, 2, 3, 5, 16, 17)
CACHES: dict[str, Any] = {"k_cache": (0, 1, 2, 3), "v_cache": (0, 1, 2, 3)}


def draw_caches(d: Draw, dtype: torch.dtype, *shape: int, **kinds: bool) -> tuple[Tensor, Tensor]:
    """Keys and values in one of the layouts that keep head_dim contiguous."""
    blocks, size, heads, width = shape
    kind = d.pick("apart", "pool", "heads first", "slice", "backwards")
    if kind == "pool":
        caches = torch.zeros(blocks, 2, size, heads, width, dtype=dtype).unbind(1)
    elif kind == "heads first":
        pool = torch.zeros(blocks, heads, 2, size, width, dtype=dtype)
        caches = pool.permute(2, 0, 3, 1, 4).unbind()
    elif kind == "slice":
        pool = torch.zeros(2, 2 * blocks + 1, size + 2, 2 * heads, width + 3, dtype=dtype)
        caches = pool[:, 1::2, 1:-1, ::2, 2:-1].unbind()
    elif kind == "backwards":
        pool = torch.zeros(2, heads, size, blocks, width, dtype=dtype)
        caches = pool.transpose(1, 3).unbind()
    else:
        caches = tuple(torch.zeros(shape, dtype=dtype) for _ in "kv")
    k, v = (c.copy_(d.floats(dtype, *shape, layout=False, **kinds)) for c in caches)
    return k, v


def draw_row(d: Draw) -> tuple[int, int]:
    """Heads and head_dim of a row."""
    return d.pick(2, 1, 3, 0), d.pick(*WIDTHS, 0)


def draw_table(d: Draw, keys: list[int], block_size: int, num_blocks: int) -> Tensor:
    """Any blocks, in any order and shared; past the keys of an entry what is none."""
    used = torch.tensor([-(-n // block_size) for n in keys]).long()
    widest = max([0, *used.tolist()]) + d.pick(0, 1, 3)
    table = d.random(0, max(num_blocks, 1), len(keys), widest).int()
    table[torch.arange(widest) >= used[:, None]] = d.pick(*WILD, num_blocks)
    return d.layout(table, expand=False)


def strided_head_dim(name: str) -> Break:
    """A cache whose rows are not contiguous."""

    def apply(d: Draw, inputs: Inputs) -> Inputs | None:
        cache = inputs[name]
        if cache.shape[3] < 2:
            return None
        return {name: cache.new_zeros(*cache.shape[:3], 2 * cache.shape[3])[..., ::2]}

    return apply


def no_block_size(d: Draw, inputs: Inputs) -> Inputs:
    return {name: inputs[name][:, :0] for name in CACHES}


BROKEN_CACHES: dict[str, Break] = {
    "block_size": no_block_size,
    "k_cache strides": strided_head_dim("k_cache"),
    "v_cache strides": strided_head_dim("v_cache"),
}


def draw_append(d: Draw) -> Inputs:
    dtype, n = d.pick(*FLOATING), d.pick(*COUNTS, 300)
    blocks, size, row = d.pick(1, 2, 9, 0), d.pick(*BLOCK_SIZES), draw_row(d)
    kinds = {"infinite": True, "huge": True}
    k_cache, v_cache = draw_caches(d, dtype, blocks, size, *row, **kinds)
    slots = d.random(-2 if d.flag() or blocks == 0 else 0, blocks * size, n)
    slots[slots == -2] = -(2**63)  # padding may be any negative number
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": d.floats(dtype, n, *row, **kinds),
        "v": d.floats(dtype, n, *row, **kinds),
        "slot_mapping": d.layout(slots),
    }


def on_restored_caches(call: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`call`, which writes into the caches, with the caches as its results."""

    def apply(k_cache: Tensor, v_cache: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        with restored(k_cache, v_cache):
            call(k_cache, v_cache, **rest)
            return k_cache.clone(), v_cache.clone()

    return apply


def slot_past_the_cache(d: Draw, inputs: Inputs) -> Inputs | None:
    num_slots = inputs["k_cache"].shape[0] * inputs["k_cache"].shape[1]
    slots = changed(d, inputs["slot_mapping"], num_slots, num_slots + 2**32, 2**63 - 1)
    return None if slots is None else {"slot_mapping": slots}


def shared_memory(d: Draw, inputs: Inputs) -> Inputs | None:
    """A cache in which two slots, or heads, are one."""
    name = d.pick(*CACHES)
    cache = inputs[name]
    dims = [i for i in range(3) if cache.shape[i] > 1 and cache.numel()]
    if not dims:
        return None
    dim = d.pick(*dims)
    return {name: cache.narrow(dim, 0, 1).expand(cache.shape)}


def draw_gather(d: Draw) -> Inputs:
    dtype, lens = d.pick(*FLOATING), d.lengths()
    blocks, size, row = d.pick(4, 1, 9), d.pick(*BLOCK_SIZES), draw_row(d)
    k_cache, v_cache = draw_caches(d, dtype, blocks, size, *row, infinite=True, huge=True)
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": draw_table(d, lens, size, blocks),
        "seq_lens": d.layout(torch.tensor(lens, dtype=torch.int32), expand=False),
        "num_rows": sum(lens),
    }


def wrong_length(d: Draw, inputs: Inputs) -> Inputs | None:
    room = inputs["block_table"].shape[1] * inputs["k_cache"].shape[1]
    lens = changed(d, inputs["seq_lens"], room + 1, *WILD)
    return None if lens is None else {"seq_lens": lens}


def wrong_block(ends: Callable[[Inputs], list[tuple[int, int]]]) -> Break:
    """A block that is none where keys [begin, end) of an entry lie."""

    def apply(d: Draw, inputs: Inputs) -> Inputs | None:
        size, seen = inputs["k_cache"].shape[1], ends(inputs)
        used = [(b, at // size) for b, keys in enumerate(seen) for at in range(*keys)]
        if not used:
            return None
        table = inputs["block_table"].clone()
        table[d.pick(*used)] = d.pick(*WILD, inputs["k_cache"].shape[0])
        return {"block_table": table}

    return apply


def draw_paged(d: Draw) -> Inputs:
    dtype, head_dim, (heads, kv_heads) = d.pick(*FLOATING), d.pick(*HEAD_DIMS), d.pick(*HEADS)
    size, queries = d.pick(*BLOCK_SIZES), d.lengths(3, (1, 0, 2, 3, 5, 17, 33))
    keys = [d.pick(1, 0, 2, 7, 16, 31, 33, 64, 70, 130, 300, 700) for _ in queries]
    lens, starts = [torch.zeros(0).long()], [torch.zeros(0).long()]
    for num_queries, num_keys in zip(queries, keys, strict=True):
        lens.append(d.random(0, num_keys + 1, num_queries).sort().values)
        if d.flag():
            lens[-1][:] = num_keys
        window = d.pick(1, 2, 20, num_keys + 1, 0)
        starts.append((lens[-1] - window).clamp(min=0))
    context_lens, context_starts = torch.cat(lens).int(), torch.cat(starts).int()
    blocks = d.pick(1, 4, 50)
    k_cache, v_cache = draw_caches(d, dtype, blocks, size, kv_heads, head_dim)
    inputs = {
        "q": d.floats(dtype, sum(queries), heads, head_dim),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": draw_table(d, [max([0, *n.tolist()]) for n in lens[1:]], size, blocks),
        "context_lens": d.layout(context_lens, expand=False),
        "cu_seqlens_q": packed(queries),
        "context_starts": d.layout(context_starts, expand=False) if d.flag() else None,
        "scale": d.pick(None, 1.0, 0.0, -0.7),
    }
    if d.flag():  # what no query sees may hold anything
        seen = torch.zeros(blocks * size, dtype=torch.bool)
        for table, (begin, end) in zip(inputs["block_table"], seen_keys(inputs), strict=True):
            table[: begin // size] = d.pick(*WILD)
            at = torch.arange(begin, end)
            seen[table[at // size] * size + at % size] = True
        for cache in (k_cache, v_cache):
            cache.masked_fill_(~seen.view(blocks, size, 1, 1), d.pick(torch.nan, torch.inf))
    return inputs


def seen_keys(inputs: Inputs) -> list[tuple[int, int]]:
    """Of each entry the keys from the first to the last that a query sees."""
    lens, starts = inputs["context_lens"], inputs["context_starts"]
    starts = torch.zeros_like(lens) if starts is None else starts
    return [
        (int(starts[a]), int(lens[b - 1])) if a < b else (0, 0)
        for a, b in pairwise(inputs["cu_seqlens_q"].tolist())
    ]


def paged_magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    """Those of depth_attention over all slots that hold keys."""
    k, v = (inputs[name].nan_to_num(0, 0).flatten(0, 1) for name in CACHES)
    dense = {"q": inputs["q"], "k": k, "v": v, "key_bias": None, "scale": inputs["scale"]}
    return magnitudes(op, dense)


def changed_query(name: str, *values: int) -> Break:
    """A bound of a query, of these values or beyond what its entry holds."""

    def apply(d: Draw, inputs: Inputs) -> Inputs | None:
        bounds = inputs[name]
        if bounds is None:
            return None
        room = inputs["block_table"].shape[1] * inputs["k_cache"].shape[1]
        bounds = changed(d, bounds, room + 1, *values)
        return None if bounds is None else {name: bounds}

    return apply


def wrong_head_dim(d: Draw, inputs: Inputs) -> Inputs:
    """None, or more than the kernels hold."""
    width = d.pick(0, 257)
    return {n: inputs[n].new_zeros(*inputs[n].shape[:-1], width) for n in ("q", *CACHES)}


def wrong_heads(d: Draw, inputs: Inputs) -> Inputs | None:
    """Query heads that cannot share the key heads."""
    q, kv_heads = inputs["q"], inputs["k_cache"].shape[2]
    return None if kv_heads == 1 else {"q": q.new_zeros(q.shape[0], kv_heads + 1, q.shape[2])}


OPERATORS = {
    "kv_append": Operator(
        on_restored_caches(kv_append),
        on_restored_caches(append_reference),
        draw_append,
        "kv_append",
        exact=True,
        tied=CACHES | {"k": (0, 1, 2), "v": (0, 1, 2), "slot_mapping": (0,)},
        broken=BROKEN_CACHES | {"slot": slot_past_the_cache, "shared memory": shared_memory},
    ),
    "kv_gather": Operator(
        kv_gather,
        gather_reference,
        draw_gather,
        "kv_gather",
        exact=True,
        tied=CACHES | {"block_table": (0,), "seq_lens": (0,)},
        broken=BROKEN_CACHES
        | {
            "length": wrong_length,
            "block": wrong_block(lambda inputs: [(0, n) for n in inputs["seq_lens"].tolist()]),
            "num_rows": lambda d, inputs: {
                "num_rows": inputs["num_rows"] + d.pick(1, -1, 2**31, 2**40, -(2**40))
            },
        },
    ),
    "paged_depth_attention": Operator(
        paged_depth_attention,
        paged_reference,
        draw_paged,
        "paged_depth_attention",
        magnitudes=paged_magnitudes,
        tied=CACHES
        | {"q": (0, 2), "block_table": (0,), "cu_seqlens_q": (0,)}
        | {"context_lens": (0,), "context_starts": (0,)},
        broken=BROKEN_CACHES
        | broken_cu_seqlens("cu_seqlens_q")
        | {
            "context_lens": changed_query("context_lens", *WILD),
            "context_starts": changed_query("context_starts", *WILD),
            "context_lens fall": falling("context_lens", "cu_seqlens_q"),
            "context_starts fall": falling("context_starts", "cu_seqlens_q"),
            "block": wrong_block(seen_keys),
            "head_dim": wrong_head_dim,
            "heads": wrong_heads,
        },
    ),
}
