"""No operator allocates more than its outputs plus O(rows).

depth_attention and bipartite_match have such a test, at their own sizes, in their own files.
"""

from collections.abc import Callable
from typing import Any

import pytest
import test_kv_append
import test_kv_gather
import test_paged_depth_attention
import test_scatter_tokens
import torch
from torch import Tensor

from mor import ops
from mor.ops.packed_linear import pack_linear

ROWS, WIDTH = 4096, 64  # a row of float32 has 256 bytes
PER_ROW = 32  # bytes allowed beside the outputs: some indices or sums for each row
X = torch.randn(ROWS, WIDTH)
KEYS = torch.randint(0, ROWS // 4, (ROWS,))
BOUNDS = torch.tensor([0, ROWS // 2, ROWS], dtype=torch.int32)
FLAGS = torch.rand(ROWS) < 0.5
SCATTERED = test_scatter_tokens.make_inputs((ROWS, ROWS, WIDTH), "falling-repeats")
APPENDED = test_kv_append.make_inputs((ROWS // 16, 16, 1, WIDTH), ROWS, "repeated")
PACKED = pack_linear(X[:WIDTH])
CACHED = test_kv_gather.make_inputs([ROWS // 2, ROWS // 2], (16, 1, WIDTH))


def in_place(_: Tensor) -> None:
    """So that the result does not count as allocated."""


def attention(queries: int, keys: int) -> Any:
    entries = ROWS // keys
    shape = {"queries": [queries] * entries, "keys": [keys] * entries, "heads": (1, 1)}
    inputs = test_paged_depth_attention.make_inputs(**shape, head_dim=WIDTH)
    return lambda: ops.paged_depth_attention(**inputs)


CALLS: dict[str, Any] = {
    "gather_tokens": lambda: ops.gather_tokens(X, KEYS),
    "scatter_tokens": lambda: ops.scatter_tokens(**SCATTERED),
    "scatter_tokens_": lambda: in_place(ops.scatter_tokens_(**SCATTERED)),
    "route_topk": lambda: ops.route_topk(X[:, 0], 99, BOUNDS, candidates=FLAGS, by_score=True),
    "route_threshold": lambda: ops.route_threshold(X[:, 0], 0.1, BOUNDS, candidates=FLAGS),
    "group_rows": lambda: ops.group_rows(KEYS, ROWS // 4, BOUNDS),
    "segment_reduce-sum": lambda: ops.segment_reduce(X, KEYS, ROWS // 4, "sum"),
    "segment_reduce-mean": lambda: ops.segment_reduce(X, KEYS, ROWS // 4, "mean", X[:, 0].exp()),
    "segment_reduce-amax": lambda: ops.segment_reduce(X, KEYS, ROWS // 4, "amax"),
    "paged_depth_attention-decode": attention(1, 512),
    "paged_depth_attention-one-entry": attention(1, ROWS),
    "paged_depth_attention-prefill": attention(512, 512),
    "packed_linear": lambda: ops.packed_linear(X, PACKED, WIDTH),
    "kv_append": lambda: ops.kv_append(**APPENDED),
    "kv_gather": lambda: ops.kv_gather(**CACHED),
}


@pytest.mark.unsanitized
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_memory_is_the_outputs_and_of_the_order_of_the_rows(call: Callable[[], Any]) -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        outputs = call()
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs or ()
    assert taken <= sum(t.nbytes for t in tensors) + PER_ROW * ROWS
