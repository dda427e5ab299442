"""What the benchmarks of routed tokens share: shapes, inputs, gradients."""

from collections.abc import Callable
from typing import Any

import torch
from harness import generator
from torch import Tensor

__all__ = ["SHAPES", "ascending_rows", "both_ways", "packed"]

#: B, S, D.
SHAPES = {"small": (8, 1024, 576), "large": (8, 2048, 960), "smoke": (2, 36, 65)}


def ascending_rows(batch: int, length: int, k: int) -> Tensor:
    """Random k rows of every sequence, ascending, as route_topk returns them: [B, k] in [0, S)."""
    chosen = torch.rand(batch, length, generator=generator()).topk(k, dim=1).indices
    return chosen.sort(dim=1).values


def packed(rows: Tensor, length: int) -> Tensor:
    """Rows of [B, S, D] as rows of [B * S, D]."""
    return (rows + torch.arange(rows.shape[0])[:, None] * length).flatten()


def both_ways(
    forms: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], grad: Tensor
) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each form, to the inputs that require gradients."""
    leaves = [t for t in inputs if t.requires_grad]
    return {
        name: lambda form=form: torch.autograd.grad(form(*inputs), leaves, grad)
        for name, form in forms.items()
    }
