"""The checks of csrc/checks.h for fake kernels, in the same words."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.ops._transforms import forward_mode, has_tangent

__all__ = [
    "check_head_dim",
    "check_kv_cache",
    "check_operands",
    "expect",
    "refuse_gradients",
    "refuse_non_tensors",
]

# By operator, the (name, shape, dtypes, sizes) of each operand, as csrc/operands.h has them.
_OPERANDS = {
    op: [line.split("\t") for line in lines]
    for op, *lines in (text.split("\n") for text in torch.ops.mor.operands().split("\n\n"))
}


def expect(op: str, condition: Any, text: str, *got: Any) -> None:
    """Refuses unless `condition`, which may be symbolic, in the words of the C++ checks."""
    torch._check(condition, lambda: ", got ".join([f"{op}: expected {text}", *map(str, got)]))


def check_operands(op: str, first: Tensor, *others: Tensor | None) -> None:
    """What Operands::check of csrc/operands.h does, for fake tensors; operands in its order."""
    sizes: dict[str, Any] = {}
    shapes: dict[str, list[Any]] = {}
    for (name, shape, dtypes, fits), t in zip(_OPERANDS[op], (first, *others), strict=True):
        if t is None:
            continue
        names = shape[1:-1].split(", ") if shape else []
        got = shapes[name] = list(t.shape)
        expect(op, not shape or len(names) == len(got), f"{name} of shape {shape}", got)
        dtypes = dtypes.replace("floating", "float32, bfloat16, float16 or float64")
        dtypes = dtypes.replace("same", _name(first.dtype))
        dtypes = dtypes.replace("sums", _name(torch.promote_types(first.dtype, torch.float32)))
        known = dtypes == "any" or _name(t.dtype) in re.split(", | or ", dtypes)
        expect(op, known, f"{name} of dtype {dtypes}", _name(t.dtype))
        expect(op, t.device == first.device, f"{name} on {first.device}", t.device)
        expected = []
        for size, dim in zip(got, names, strict=bool(shape)):
            more = int(dim.endswith(" + 1"))
            expect(op, size >= more, f"{name} of at least one element", got)
            expected.append(sizes.setdefault(dim.removesuffix(" + 1"), size - more) + more)
        if fits[:1] in ("", "("):
            usual = f"of {expected[0]} elements" if len(names) == 1 else f"of shape {expected}"
            fits = f"{name} {usual} {fits}".rstrip()
        for size, wanted in zip(got, expected, strict=bool(shape)):
            expect(op, size == wanted, fits.format(**shapes), shapes[fits.split()[0]])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_head_dim(op: str, t: Tensor, rank: int) -> None:
    """The last size of t, before others are compared with it; leaves another rank to others."""
    head_dim = t.shape[-1] if t.dim() == rank else 1
    expect(op, 1 <= head_dim <= 256, "head_dim in 1..256", head_dim)


def check_kv_cache(k_cache: Tensor, v_cache: Tensor, op: str) -> None:
    """Block size and strides of a paged cache."""
    expect(op, k_cache.shape[1] >= 1, "a block_size of at least 1", list(k_cache.shape))
    for t, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        contiguous, strides = t.shape[3] <= 1 or t.stride(3) == 1, list(t.stride())
        expect(op, contiguous, f"{name} with a contiguous head_dim, got strides {strides}")


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
