"""kv_gather against torch.gather over an expanded index (the authors' form) and index_select.

The slots are made beforehand for the others. `limit clone` is a copy of the result. A ratio above 1
means that ours is faster.
"""

from itertools import product

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted

from mor.ops import kv_gather

KV_HEADS, HEAD_DIM, BLOCK = 3, 64, 16


def measure(shape: tuple[int, int], dtype: torch.dtype) -> None:
    batch, longest = shape
    lengths = torch.linspace(longest, longest // 32, batch).long().tolist()
    what = {"sequences": batch, "rows": sum(lengths), "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    random, blocks = generator(), -(-longest // BLOCK)
    table = torch.randperm(batch * blocks, generator=random).view(batch, blocks)
    shape = (batch * blocks, BLOCK, KV_HEADS, HEAD_DIM)
    caches = [torch.randn(shape, generator=random).to(dtype) for _ in "kv"]
    flat = [t.flatten(0, 1) for t in caches]
    positions = [torch.arange(n) for n in lengths]
    slots = torch.cat(
        [row[at // BLOCK] * BLOCK + at % BLOCK for row, at in zip(table, positions, strict=True)]
    )
    expanded = slots[:, None, None].expand(-1, KV_HEADS, HEAD_DIM)
    seq_lens, table = torch.tensor(lengths, dtype=torch.int32), table.int()
    indexing = compiled(lambda: [t[slots] for t in flat])
    calls = {
        "ours": lambda: kv_gather(*caches, table, seq_lens, len(slots))[:2],
        "authors": lambda: [t.gather(0, expanded) for t in flat],
        "index_select": lambda: [t.index_select(0, slots) for t in flat],
        "indexing": lambda: [t[slots] for t in flat],
        "compiled indexing": indexing,
    }
    with torch.inference_mode():
        want = calls["ours"]()
        for name, call in calls.items():
            assert all(map(torch.equal, call(), want)), name
        calls["limit clone"] = lambda: [t.clone() for t in want]
        line(what, calls)


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product([(2, 64)] if args.smoke else [(8, 4096), (32, 4096)], DTYPES):
        measure(*what)
    report("kv_gather")
