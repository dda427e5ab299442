"""packed_linear, as fuzz_operators.py lists it."""

import torch
from fuzzing import COUNTS, WIDTHS, Draw, Inputs, Operator

from mor.ops import packed_linear
from mor.ops.packed_linear import pack_linear, reference


def draw_packed_linear(d: Draw) -> Inputs:
    dtype, inputs, outputs = (
        d.pick(torch.float32, torch.bfloat16), d.pick(0, *WIDTHS), d.pick(0, *WIDTHS),
    )  # fmt: skip
    infinite = d.flag()
    packed = pack_linear(d.floats(dtype, outputs, inputs, infinite=infinite))
    return {
        "x": d.floats(dtype, d.pick(*COUNTS), inputs, infinite=infinite),
        "packed": d.layout(packed, expand=False),
        "num_outputs": outputs,
        "bias": d.floats(dtype, outputs, infinite=infinite) if d.flag() else None,
    }


OPERATORS = {
    "packed_linear": Operator(
        packed_linear,
        reference,
        draw_packed_linear,
        "packed_linear",
        tied={"packed": (0, 1, 2), "bias": (0,)},
        broken={"num_outputs": lambda d, _: {"num_outputs": d.pick(-1, -(2**40))}},
    ),
}
