"""What a call costs at the smallest size, in inference mode, against torch.mm of 2 x 2.

Nothing is computed to speak of: the time is that of Python, the dispatcher, the checks and the
results. The aim is at most twice torch.mm, an `x limit mm` of 0.5. On CUDA, whose launches events
do not see, it is the time of the smallest kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import line, parse_args, report

from mor import ops


def calls() -> dict[str, Callable[[], Any]]:
    """Two rows of one sequence for every operator."""
    x, y = torch.zeros(2, 8), torch.zeros(2, 8)
    scores, rows = torch.ones(2), torch.arange(2)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    qkv, cache = torch.ones(2, 1, 8), torch.ones(1, 2, 1, 8)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    cu_one = torch.tensor([0, 1], dtype=torch.int32)
    return {
        "gather_tokens": lambda: ops.gather_tokens(x, rows),
        "scatter_tokens": lambda: ops.scatter_tokens(x, y, rows, scores),
        "scatter_tokens_": lambda: ops.scatter_tokens_(x, y, rows, scores),
        "route_topk": lambda: ops.route_topk(scores, 1, cu),
        "route_threshold": lambda: ops.route_threshold(scores, 0.5, cu),
        "group_rows": lambda: ops.group_rows(rows, 2, cu),
        "segment_reduce": lambda: ops.segment_reduce(x, rows, 2, "sum"),
        "bipartite_match": lambda: ops.bipartite_match(x, x, cu, cu),
        "depth_attention": lambda: ops.depth_attention(qkv, qkv, qkv, rows, rows, cu, cu),
        "paged_depth_attention": lambda: ops.paged_depth_attention(
            qkv[:1], cache, cache, table, lens, cu_one
        ),
        "kv_append": lambda: ops.kv_append(cache, cache, qkv, qkv, rows),
        "kv_gather": lambda: ops.kv_gather(cache, cache, table, lens, 2),
    }


if __name__ == "__main__":
    parse_args(__doc__)
    a = torch.ones(2, 2)
    with torch.inference_mode():
        for name, call in calls().items():
            line({"operator": name}, {"ours": call, "limit mm": lambda: torch.mm(a, a)})
    report("dispatch")
