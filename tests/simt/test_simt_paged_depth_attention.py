import ctypes
from typing import Any

import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_paged_depth_attention import CASES, GQA, MIXED, VARIED, make_inputs
from torch import Tensor

from mor.ops.paged_depth_attention import reference
from tests.support.operators import assert_close_to_reference

CASES_BY_ID = in_harness(CASES)
PREFILL = {"queries": [20, 7], "keys": [60, 30], "heads": (3, 1), "head_dim": 17}
FLOATING = ("q", "k_cache", "v_cache")
POINTERS = (
    "q", "k_cache", "v_cache", "block_table", "context_lens", "cu_seqlens_q", "context_starts",
    "out", "lse", "parts", "totals",
)  # fmt: skip
SIZES = (
    "num_queries", "num_entries", "max_blocks", "block_size", "num_heads", "num_kv_heads",
    "head_dim", "aligned", "num_splits",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """As bindings/paged_depth_attention.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("strides", ctypes.c_int64 * 8),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
    )


def run(
    kernels: Kernels, inputs: dict[str, Any], splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """By the kernels; every scratch and result has exactly its size."""
    q, k, v = (inputs[name] for name in FLOATING)
    (num_queries, num_heads, head_dim), size = q.shape, q.element_size()
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    strides = [*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]]
    places = [t.data_ptr() for t in (q, k, v)] + [s * size for s in (*strides, head_dim)]
    scale = inputs["scale"]
    arguments = Arguments(
        strides=(ctypes.c_int64 * 8)(*strides),
        num_queries=num_queries, num_entries=len(inputs["block_table"]),
        max_blocks=inputs["block_table"].shape[1], block_size=k.shape[1], num_heads=num_heads,
        num_kv_heads=k.shape[2], head_dim=head_dim, aligned=all(p % 16 == 0 for p in places),
        scale=head_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    if splits is None:
        chosen = torch.zeros(1, dtype=torch.int64)
        if num_queries and num_heads:
            kernels.call("paged_depth_attention_splits", ctypes.byref(arguments), chosen)
        splits = int(chosen)
    arguments.num_splits = splits
    rows = splits * num_queries * num_heads if splits > 1 else 0
    tensors = {
        **inputs,
        "out": torch.empty(q.shape, dtype=q.dtype),
        "lse": torch.empty(num_heads, num_queries, dtype=total),
        "parts": torch.empty(rows, head_dim, dtype=total),
        "totals": torch.empty(rows, 2, dtype=total),
    }
    for name in POINTERS:
        setattr(arguments, name, None if tensors[name] is None else tensors[name].data_ptr())
    kernels.call("paged_depth_attention", q.dtype, ctypes.byref(arguments))
    return tensors["out"], tensors["lse"]


def check(kernels: Kernels, inputs: dict[str, Any], splits: int | None = None) -> None:
    same = reference(**inputs)
    exact = reference(**inputs | {name: inputs[name].double() for name in FLOATING})
    for name, got, low, high in zip(
        ("out", "lse"), run(kernels, inputs, splits), same, exact, strict=True
    ):
        assert_close_to_reference(name, got, low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_paged_depth_attention(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, inputs_of(CASES_BY_ID[case], dtype))


# The kernels of float32 and bfloat16 with other types: one build is enough.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in VARIED if c in CASES_BY_ID])
def test_other_types(plain_kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(plain_kernels, inputs_of(CASES_BY_ID[case], dtype))


@pytest.mark.parametrize("window", [None, 13])
def test_prefill(kernels: Kernels, window: int | None) -> None:
    check(kernels, make_inputs(torch.bfloat16, **PREFILL, window=window))


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("case", ["decode", "decode-one-long", "mixed-any-window"])
def test_any_number_of_pieces(kernels: Kernels, case: str, splits: int) -> None:
    check(kernels, inputs_of(CASES_BY_ID[case], torch.float32), splits)


def test_slices_of_a_pool(kernels: Kernels) -> None:
    inputs = make_inputs(torch.bfloat16, **MIXED, **GQA, block_size=5)
    want = run(kernels, inputs)
    pool = torch.stack([inputs["k_cache"], inputs["v_cache"]], dim=1).transpose(2, 3).contiguous()
    inputs["k_cache"], inputs["v_cache"] = pool.transpose(2, 3).unbind(1)
    got = run(kernels, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_caches_of_different_layouts(kernels: Kernels) -> None:
    inputs = make_inputs(torch.bfloat16, **MIXED, **GQA, block_size=5)
    inputs["k_cache"] = inputs["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    check(kernels, inputs)
