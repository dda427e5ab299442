import ctypes
from typing import Any

import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_depth_attention import CASES
from torch import Tensor

from mor.ops.depth_attention import reference
from tests.support.operators import assert_close_to_reference

CASES_BY_ID = in_harness(CASES)
FLOATING = ("q", "k", "v", "key_bias")
OPERANDS = ("q", "k", "v", "grad_out", "forward_out")
POINTERS = (
    "q", "k", "v", "q_positions", "k_positions", "cu_seqlens_q", "cu_seqlens_k", "q_depths",
    "k_depths", "key_bias", "grad_out", "forward_out", "key_ranges", "out", "lse", "delta",
    "grad_q", "grad_k", "grad_v", "grad_bias_parts", "grad_key_bias",
)  # fmt: skip
SIZES = (
    "num_queries", "num_keys", "num_sequences", "num_heads", "num_kv_heads", "head_dim", "causal",
    "aligned", "window",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """As bindings/depth_attention.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("strides", ctypes.c_int64 * 10),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
    )


def run(kernels: Kernels, inputs: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    """Forward and backward by the kernels; every scratch and result has exactly its size."""
    q, k = inputs["q"], inputs["k"]
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    bias = inputs["key_bias"] is not None

    def result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    tensors = {
        **inputs,
        "grad_out": grad_out,
        "key_ranges": torch.empty(num_queries, 2, dtype=torch.int32),
        "out": result(q.shape, q.dtype),
        "lse": result((num_heads, num_queries), total),
        "delta": result((num_heads, num_queries), total),
        "grad_q": result(q.shape, q.dtype),
        "grad_k": result(k.shape, q.dtype),
        "grad_v": result(k.shape, q.dtype),
        "grad_bias_parts": result((num_kv_heads, num_keys), total) if bias else None,
        "grad_key_bias": result((num_keys,), total) if bias else None,
    }
    tensors["forward_out"] = tensors["out"]
    strides = [s for name in OPERANDS for s in tensors[name].stride()[:2]]
    size = q.element_size()
    places = [tensors[n].data_ptr() for n in OPERANDS] + [s * size for s in strides]
    scale = inputs["scale"]
    arguments = Arguments(
        **{n: None if tensors[n] is None else tensors[n].data_ptr() for n in POINTERS},
        strides=(ctypes.c_int64 * 10)(*strides),
        num_queries=num_queries, num_keys=num_keys, num_sequences=len(inputs["cu_seqlens_q"]) - 1,
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        causal=inputs["causal"], aligned=all(p % 16 == 0 for p in [*places, head_dim * size]),
        window=inputs["window"] or 0, scale=head_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    kernels.call("depth_attention", q.dtype, ctypes.byref(arguments))
    kernels.call("depth_attention_backward", q.dtype, ctypes.byref(arguments))
    names = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_key_bias")
    return {name: tensors[name] for name in names if tensors[name] is not None}


def expected(inputs: dict[str, Any], grad_out: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the plain reference and autograd, with the floating inputs in `dtype`."""
    inputs = dict(inputs)
    leaves = [name for name in FLOATING if inputs[name] is not None]
    for name in leaves:
        inputs[name] = inputs[name].to(dtype if name != "key_bias" else inputs[name].dtype)
        if dtype == torch.float64:
            inputs[name] = inputs[name].double()
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    out, lse = reference(**inputs)
    out.backward(grad_out.to(out))
    results = {"out": out.detach(), "lse": lse}
    for name in leaves:
        grad = inputs[name].grad
        results[f"grad_{name}"] = torch.zeros_like(inputs[name]) if grad is None else grad
    return results


def check(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES_BY_ID[case], dtype)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(inputs["q"].shape, generator=generator, dtype=torch.float64)
    got = run(kernels, inputs, grad_out.to(dtype))
    same = expected(inputs, grad_out, dtype)
    exact = expected(inputs, grad_out, torch.float64)
    for name, value in got.items():
        factor = 3.0 if name.startswith("grad") else 2.0  # as tests.support.operators
        assert_close_to_reference(name, value, same[name], exact[name], factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_depth_attention(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, case, dtype)


# The kernels of float32 and bfloat16 with other types: one build is enough.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_other_types(plain_kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(plain_kernels, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_nobody_sees_may_hold_nan(kernels: Kernels, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES_BY_ID["small-bias-depths"], dtype)
    inputs["q_depths"][:] = 2
    hidden = inputs["k_depths"] < 2
    assert hidden.any()
    grad_out = torch.ones_like(inputs["q"])
    want = run(kernels, inputs, grad_out)
    for name in ("k", "v"):
        inputs[name][hidden] = torch.nan
    got = run(kernels, inputs, grad_out)
    for name in ("out", "lse", "grad_q"):
        assert torch.equal(got[name], want[name]), name
