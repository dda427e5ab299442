"""The checks of csrc/checks.h for fake kernels, in the same words."""

import torch
from torch import Tensor

__all__ = [
    "FLOATING",
    "check_cu_seqlens",
    "check_dim",
    "check_dtype",
    "check_rows_index",
    "check_same_device",
    "check_size",
    "dtype_str",
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


def check_rows_index(t: Tensor, reference: Tensor, op: str) -> None:
    """Rows [K] int64 on the device of `reference`."""
    check_dim(t, 1, op, "rows", "[K]")
    check_dtype(t, (torch.int64,), "int64", op, "rows")
    check_same_device(t, reference, op, "rows")
