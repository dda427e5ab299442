"""Rows to add to: ascending, unsorted and repeated, with and without factors."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import scatter_tokens, scatter_tokens_
from mor.ops.scatter_tokens import reference
from tests.cases.gather_tokens import make_rows
from tests.support.operators import OpCase


def make_inputs(
    sizes: tuple[int, int, int],
    order: str,
    gate: str = "same",
    scale: str = "same",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    num_rows, num_updates, width = sizes
    generator = generator or torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def factor(size: int, kind: str) -> Tensor | None:
        if kind == "none":
            return None
        return normal(size).float() if kind == "float32" else normal(size)

    return {
        "base": normal(num_rows, width),
        "updates": normal(num_updates, width),
        "rows": make_rows(num_rows, num_updates, order, generator).to(device),
        "gate": factor(num_updates, gate),
        "base_scale": factor(num_rows, scale),
    }


def case(
    sizes: tuple[int, int, int],
    order: str,
    gate: str = "same",
    scale: str = "none",
    op: Any = scatter_tokens,
    opcheck: bool = False,
) -> OpCase:
    differentiable = ["base", "updates"]
    differentiable += ["gate"] if gate != "none" else []
    differentiable += ["base_scale"] if scale != "none" else []
    return OpCase(
        id="N{}-K{}-D{}".format(*sizes) + f"-{order}-gate-{gate}-scale-{scale}",
        op=op,
        reference=reference,
        raw=torch.ops.mor.scatter_tokens.default if op is scatter_tokens else None,
        opcheck=opcheck,
        make=lambda *args: make_inputs(sizes, order, gate, scale, *args),
        differentiable=tuple(differentiable) if op is scatter_tokens else (),
    )


def in_place(base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """scatter_tokens_ on a copy that keeps the strides of base."""
    storage = torch.empty_strided(base.size(), base.stride(), dtype=base.dtype, device=base.device)
    copy = storage.copy_(base)
    assert scatter_tokens_(copy, *args, **kwargs) is copy
    return copy


SPECS: list[tuple[Any, ...]] = [
    ((0, 0, 4), "ascending", "same", "same"),
    ((5, 0, 4), "ascending", "same", "same"),
    ((5, 0, 4), "ascending", "none", "none"),
    ((5, 3, 0), "ascending", "same", "same"),
    ((1, 1, 1), "ascending", "same", "none"),
    ((7, 7, 5), "ascending", "same", "same"),
    ((7, 7, 5), "ascending", "none", "none"),
    ((33, 20, 17), "ascending", "same", "none"),
    ((33, 20, 17), "unsorted", "none", "same"),
    ((9, 30, 3), "repeated", "same", "same"),
    ((9, 30, 3), "falling-repeats", "same", "same"),
    ((9, 30, 3), "falling-repeats", "same", "none"),
    ((1, 50, 65), "falling-repeats", "same", "same"),
    ((40, 39, 9), "falling-repeats", "none", "none"),
    ((300, 150, 576), "ascending", "same", "none"),
    ((300, 150, 576), "falling-repeats", "same", "same"),
    ((200, 67, 960), "unsorted", "same", "none"),
]
CASES = [case(*spec, opcheck=spec[0] == (7, 7, 5)) for spec in SPECS]
IN_PLACE_CASES = [case(*spec, op=in_place) for spec in SPECS]
# In float64, gradcheck wants float64 factors: these cases leave it out.
MIXED_CASES = [
    case((33, 20, 17), "ascending", "float32", "float32"),
    case((9, 30, 130), "falling-repeats", "float32", "none"),
    case((9, 30, 130), "repeated", "float32", "same"),
    case((300, 150, 576), "ascending", "float32", "none"),
]
