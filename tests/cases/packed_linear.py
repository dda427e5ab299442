"""Inputs of packed_linear: rows around the tiles, inputs and outputs around the panels."""

from typing import Any

import torch
from torch import Tensor

from mor.ops import packed_linear
from mor.ops.packed_linear import pack_linear, reference
from tests.support.operators import OpCase


def make_inputs(
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    generator = generator or torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    return {
        "x": normal(rows, inputs),
        "packed": pack_linear(normal(outputs, inputs)),
        "num_outputs": outputs,
        "bias": normal(outputs) if bias else None,
    }


def case(rows: int, inputs: int, outputs: int, bias: bool = True) -> OpCase:
    return OpCase(
        id=f"{rows}x{inputs}-to-{outputs}" + "-bias" * bias,
        op=packed_linear,
        reference=reference,
        raw=torch.ops.mor.packed_linear.default,
        opcheck=outputs == 17,
        make=lambda *args: make_inputs(rows, inputs, outputs, bias, *args),
    )


CASES = [
    case(0, 8, 5),
    case(3, 0, 5),
    case(3, 0, 5, bias=False),
    case(3, 8, 0),
    case(1, 1, 1),
    case(2, 7, 33),
    case(5, 65, 17),
    case(5, 65, 17, bias=False),
    case(6, 32, 64),
    case(7, 33, 48, bias=False),
    case(31, 40, 31),
    case(64, 129, 100),
    case(4, 576, 192, bias=False),
]
