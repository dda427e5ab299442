"""The checks of csrc/checks.h for fake kernels, in the same words."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.ops._transforms import forward_mode, has_tangent

__all__ = [
    "FLOATING",
    "check_block_table",
    "check_cu_seqlens",
    "check_dim",
    "check_dtype",
    "check_int_vector",
    "check_kv_cache",
    "check_row_mask",
    "check_rows_index",
    "check_same_device",
    "check_size",
    "dtype_str",
    "refuse_gradients",
    "refuse_non_tensors",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_str(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def check_dim(t: Tensor, dim: int, op: str, name: str, shape: str) -> None:
    """Rank."""
    torch._check(
        t.dim() == dim, lambda: f"{op}: expected {name} of shape {shape}, got {list(t.shape)}"
    )


def check_dtype(
    t: Tensor, dtypes: tuple[torch.dtype, ...], expected: str, op: str, name: str
) -> None:
    """Dtype, one of several; `expected` names them."""
    torch._check(
        t.dtype in dtypes,
        lambda: f"{op}: expected {name} of dtype {expected}, got {dtype_str(t.dtype)}",
    )


def check_same_device(t: Tensor, reference: Tensor, op: str, name: str) -> None:
    """Device."""
    torch._check(
        t.device == reference.device,
        lambda: f"{op}: expected {name} on {reference.device}, got {t.device}",
    )


def check_size(t: Tensor, size: int, what: str, op: str, name: str) -> None:
    """Number of elements of a vector; `what` says whose size it must have."""
    torch._check(
        t.shape[0] == size,
        lambda: f"{op}: expected {name} of {size} elements ({what}), got {list(t.shape)}",
    )


def check_cu_seqlens(t: Tensor, reference: Tensor, op: str, name: str = "cu_seqlens") -> int:
    """Shape [B + 1] int32 on the device of `reference`; returns B."""
    check_dim(t, 1, op, name, "[B + 1]")
    check_dtype(t, (torch.int32,), "int32", op, name)
    check_same_device(t, reference, op, name)
    torch._check(t.shape[0] >= 1, lambda: f"{op}: expected {name} of at least one element, got [0]")
    return t.shape[0] - 1


def check_row_mask(t: Tensor, scores: Tensor, op: str, name: str) -> None:
    """Shape [N] bool on the device of scores [N]."""
    check_dim(t, 1, op, name, "[N]")
    check_dtype(t, (torch.bool,), "bool", op, name)
    check_same_device(t, scores, op, name)
    check_size(t, scores.shape[0], "the rows of scores", op, name)


def check_rows_index(t: Tensor, reference: Tensor, op: str) -> None:
    """Rows [K] int64 on the device of `reference`."""
    check_dim(t, 1, op, "rows", "[K]")
    check_dtype(t, (torch.int64,), "int64", op, "rows")
    check_same_device(t, reference, op, "rows")


def check_kv_cache(k_cache: Tensor, v_cache: Tensor, op: str) -> None:
    """A paged cache of keys and one of values, of the same shape."""
    shape = "[num_blocks, block_size, Hkv, head_dim]"
    check_dim(k_cache, 4, op, "k_cache", shape)
    check_dim(v_cache, 4, op, "v_cache", shape)
    check_dtype(k_cache, FLOATING, "float32, bfloat16, float16 or float64", op, "k_cache")
    check_dtype(v_cache, (k_cache.dtype,), dtype_str(k_cache.dtype), op, "v_cache")
    check_same_device(v_cache, k_cache, op, "v_cache")
    torch._check(
        v_cache.shape == k_cache.shape,
        lambda: (
            f"{op}: expected v_cache of the shape of k_cache {list(k_cache.shape)}, "
            f"got {list(v_cache.shape)}"
        ),
    )
    torch._check(
        k_cache.shape[1] >= 1,
        lambda: f"{op}: expected a block_size of at least 1, got {list(k_cache.shape)}",
    )
    for t, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        contiguous = t.shape[3] <= 1 or t.stride(3) == 1
        strides = list(t.stride())
        torch._check(
            contiguous,
            lambda name=name, strides=strides: (
                f"{op}: expected {name} with a contiguous head_dim, got strides {strides}"
            ),
        )


def check_int_vector(
    t: Tensor, size: int, reference: Tensor, op: str, name: str, shape: str
) -> None:
    """Shape [size] int32 on the device of `reference`."""
    check_dim(t, 1, op, name, shape)
    check_dtype(t, (torch.int32,), "int32", op, name)
    check_same_device(t, reference, op, name)
    torch._check(
        t.shape[0] == size,
        lambda: f"{op}: expected {name} of {size} elements, got {list(t.shape)}",
    )


def check_block_table(t: Tensor, reference: Tensor, op: str) -> None:
    """Shape [B, max_blocks] int32 on the device of `reference`."""
    check_dim(t, 2, op, "block_table", "[B, max_blocks]")
    check_dtype(t, (torch.int32,), "int32", op, "block_table")
    check_same_device(t, reference, op, "block_table")


def refuse_gradients(op: str, instead: str, **operands: Tensor | None) -> None:
    """For operators without a gradient: an error where one would be needed, not silent zeros."""
    if forward_mode():
        for name, t in operands.items():
            if t is not None and has_tangent(t):
                raise RuntimeError(
                    f"{op}: expected operands that need no gradient, got {name} with a tangent "
                    f"(forward mode); use {instead}"
                )
    if torch.is_grad_enabled():
        for name, t in operands.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{op}: expected operands that need no gradient, got {name} with "
                    f"requires_grad; use {instead}"
                )


def refuse_non_tensors(operator: Callable[..., Any], **operands: Any) -> None:
    """Names an operand that is no tensor; called where an operator has failed, before `raise`.

    So looking costs a call nothing. The operands are named one by one, and nothing returns an
    error: a frame whose `locals()` or variables hold its own error is a cycle, which would keep the
    operands in memory until the garbage collector runs.

    Raises:
        TypeError: an operand is no tensor where `operator` is annotated with one.
    """
    op = operator.__name__
    for name, got in operands.items():
        if not isinstance(got, Tensor) and (
            got is not None or operator.__annotations__[name] is Tensor
        ):
            raise TypeError(
                f"{op}: expected {name} as a tensor, got {type(got).__name__}; "
                f"use torch.as_tensor({name})"
            )
