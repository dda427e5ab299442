"""kv_gather against index_select over the slots, and against a copy of the result.

The slots are made beforehand for index_select. A ratio above 1 means that ours is faster.
"""

from typing import Any

import torch
from harness import parse_args, report
from routed import line

from mor.ops import kv_gather

KV_HEADS, HEAD_DIM, BLOCK = 3, 64, 16


def measure(lengths: list[int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-n // BLOCK) for n in lengths]
    order = torch.randperm(sum(blocks), generator=generator).int()
    table = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
    for b, dealt in enumerate(order.split(blocks)):
        table[b, : blocks[b]] = dealt
    shape = (sum(blocks), BLOCK, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    slots = torch.cat(
        [
            table[b, torch.arange(n) // BLOCK].long() * BLOCK + torch.arange(n) % BLOCK
            for b, n in enumerate(lengths)
        ]
    )
    candidates = {
        "ours": lambda: kv_gather(k_cache, v_cache, table, seq_lens, len(slots)),
        "index_select": lambda: (flat_k.index_select(0, slots), flat_v.index_select(0, slots)),
        "indexing": lambda: (flat_k[slots], flat_v[slots]),
    }
    with torch.inference_mode():
        k, v, _ = candidates["ours"]()
        for name in ("index_select", "indexing"):
            assert all(map(torch.equal, candidates[name](), (k, v))), name
        candidates["limit clone"] = lambda: (k.clone(), v.clone())
        what = {"sequences": len(lengths), "rows": len(slots), "dtype": str(dtype)[6:]}
        return line(what, candidates, repeats)


def main() -> None:
    args = parse_args(__doc__)
    longest = 64 if args.smoke else 4096
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (2,) if args.smoke else (8, 32):
            lengths = torch.linspace(longest, longest // 32, batch).long().tolist()
            rows.append(measure(lengths, dtype, args.repeats))
    report("kv_gather", rows, args)


if __name__ == "__main__":
    main()
