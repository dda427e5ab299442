"""Operators called with something else than tensors: one sentence, not torch's schema."""

import gc
import weakref

import numpy as np
import pytest
import torch

from mor import ops

CU = torch.tensor([0, 2], dtype=torch.int32)
ROWS, X = torch.arange(2), torch.zeros(2, 4)
CALLS = {
    "route_topk: expected scores": lambda other: ops.route_topk(other, 1, CU),
    "route_topk: expected cu_seqlens": lambda other: ops.route_topk(X[:, 0], 1, other),
    "route_threshold: expected scores": lambda other: ops.route_threshold(other, 0.5, CU),
    "group_rows: expected keys": lambda other: ops.group_rows(other, 2),
    "gather_tokens: expected x": lambda other: ops.gather_tokens(other, ROWS),
    "gather_tokens: expected rows": lambda other: ops.gather_tokens(X, other),
    "scatter_tokens: expected gate": lambda other: ops.scatter_tokens(X, X, ROWS, other),
    "scatter_tokens_: expected base": lambda other: ops.scatter_tokens_(other, X, ROWS),
    "segment_reduce: expected segments": lambda other: ops.segment_reduce(X, other, 2),
    "bipartite_match: expected b": lambda other: ops.bipartite_match(X, other, CU, CU),
    "depth_attention: expected q": lambda other: ops.depth_attention(
        other, X[:, None], X[:, None], ROWS, ROWS, CU, CU
    ),
    "depth_attention: expected k_positions": lambda other: ops.depth_attention(
        X[:, None], X[:, None], X[:, None], ROWS, other, CU, CU
    ),
    "kv_append: expected slot_mapping": lambda other: ops.kv_append(
        X[None, :, None], X[None, :, None], X[:, None], X[:, None], other
    ),
    "kv_gather: expected k_cache": lambda other: ops.kv_gather(other, X, CU, CU, 2),
    "paged_depth_attention: expected block_table": lambda other: ops.paged_depth_attention(
        X[:, None], X[None, :, None], X[None, :, None], other, CU, CU
    ),
    "packed_linear: expected packed": lambda other: ops.packed_linear(X, other, 3),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other", [[0, 1], np.arange(2)], ids=["list", "numpy"])
def test_an_operand_that_is_no_tensor_is_named(call: str, other: object) -> None:
    name = call.split()[-1]
    message = f"^{call} as a tensor, got {type(other).__name__}; use torch.as_tensor"
    with pytest.raises(TypeError, match=message) as caught:
        CALLS[call](other)
    assert str(caught.value).endswith(f"({name})")


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="gather_tokens: expected rows of dtype int64") as caught:
        ops.gather_tokens(X, ROWS.int())
    assert caught.value.__cause__ is None
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.gather_tokens(X)


@pytest.mark.parametrize("rows", [ROWS.int(), [0, 1]], ids=["dtype", "list"])
def test_a_failed_call_does_not_keep_its_operands_until_garbage_is_collected(rows: object) -> None:
    gc.disable()
    try:
        x = torch.zeros(2, 4)
        freed = weakref.ref(x)
        with pytest.raises((RuntimeError, TypeError), match="expected rows"):
            ops.gather_tokens(x, rows)
        del x
        assert freed() is None
    finally:
        gc.enable()
