"""kv_append of one decoding step against index_copy_, indexing and torch.cat, as caches grow.

`cat` is what Transformers' DynamicCache does: it writes the whole cache anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleave, parse_args, report

from mor.ops import kv_append

KV_HEADS, HEAD_DIM, BLOCK = 3, 64, 16


def measure(tokens: int, context: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    blocks = tokens * -(-context // BLOCK)
    shape = (blocks, BLOCK, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.zeros(shape, dtype=dtype) for _ in "kv")
    k, v = (torch.randn(tokens, KV_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in "kv")
    slots = torch.randperm(blocks * BLOCK, generator=generator)[:tokens]
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    block, offset = slots // BLOCK, slots % BLOCK
    old_k, old_v = (torch.zeros(tokens, KV_HEADS, context, HEAD_DIM, dtype=dtype) for _ in "kv")
    new_k, new_v = (t[:, :, None] for t in (k, v))

    def copied() -> None:
        flat_k.index_copy_(0, slots, k)
        flat_v.index_copy_(0, slots, v)

    def indexed() -> None:
        k_cache[block, offset] = k
        v_cache[block, offset] = v

    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: kv_append(k_cache, v_cache, k, v, slots),
        "index_copy_": copied,
        "indexing": indexed,
        "cat": lambda: (torch.cat([old_k, new_k], 2), torch.cat([old_v, new_v], 2)),
    }
    with torch.inference_mode():
        for name in ("ours", "index_copy_", "indexing"):
            k_cache.zero_(), v_cache.zero_()
            candidates[name]()
            assert torch.equal(flat_k[slots], k), name
            assert torch.equal(flat_v[slots], v), name
        times = interleave(candidates, repeats)
    row = {"tokens": tokens, "context": context, "dtype": str(dtype)[6:]}
    row |= {f"{name} us": seconds * 1e6 for name, seconds in times.items()}
    best = min(times["index_copy_"], times["indexing"])
    return row | {"x best": best / times["ours"], "x cat": times["cat"] / times["ours"]}


def main() -> None:
    args = parse_args(__doc__)
    sizes = ((2, 32),) if args.smoke else ((1, 512), (32, 128), (32, 512), (32, 4096), (2048, 512))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, context in sizes:
            # 2048 tokens are a prefill: four sequences, not 2048.
            rows.append(measure(tokens, 4 if tokens == 2048 else context, dtype, args.repeats))
    report("kv_append", rows, args)


if __name__ == "__main__":
    main()
