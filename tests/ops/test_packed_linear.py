from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import packed_linear
from mor.ops.packed_linear import pack_linear, reference
from mor.testing import OpCase, check_bad_input, check_op

DTYPES = (torch.float32, torch.bfloat16)


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


SIZES = {
    "empty": (0, 8, 5),
    "no-inputs": (3, 0, 5),
    "no-outputs": (3, 8, 0),
    "one": (1, 1, 1),
    "two-rows": (2, 7, 33),
    "odd": (5, 65, 17),
    "tile": (6, 32, 64),
    "two-tiles": (7, 33, 48),
    "many": (31, 40, 31),
    "model": (4, 576, 192),
}


CASES = [
    OpCase(
        id=f"{name}-{'bias' if bias else 'plain'}",
        op=packed_linear,
        reference=reference,
        raw=torch.ops.mor.packed_linear.default,
        make=lambda dtype, device, generator, size=size, bias=bias: make_inputs(
            *size, bias, dtype, device, generator
        ),
        dtypes=DTYPES,
    )
    for name, size in SIZES.items()
    for bias in (True, False)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_reference(case: OpCase, dtype: torch.dtype) -> None:
    check_op(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 64, 577])
def test_a_row_depends_on_nothing_beside_it(inputs: int, dtype: torch.dtype) -> None:
    """To the bit: any number of rows, any place among them, one thread or several."""
    given = make_inputs(40, inputs, 50, dtype=dtype)
    x = given.pop("x")
    whole = packed_linear(x, **given)
    for first in range(20):
        for count in (1, 2, 3, 4, 5, 6, 7, 12, 13, 19):
            part = packed_linear(x[first : first + count], **given)
            assert torch.equal(part, whole[first : first + count])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(packed_linear(x, **given), whole)
    finally:
        torch.set_num_threads(threads)


def test_packs_as_the_contract_says() -> None:
    weight = torch.arange(17 * 3.0).view(17, 3)
    packed = pack_linear(weight)
    assert packed.shape == (2, 3, 16)
    assert packed[1, 2, 0] == weight[16, 2]
    assert packed[1, :, 1:].eq(0).all()
    pairs = pack_linear(weight.bfloat16())
    assert pairs.shape == (2, 2, 16, 2)
    assert pairs[0, 0, 5, 1] == weight[5, 1]
    assert pairs[0, 1, 5].tolist() == [weight[5, 2], 0]


BAD = {
    "x of shape": {"x": torch.zeros(4)},
    "x of dtype float32 or bfloat16": {"x": torch.zeros(2, 8, dtype=torch.float64)},
    "packed of dtype float32": {"packed": torch.zeros(1, 8, 16, dtype=torch.bfloat16)},
    "packed of pack_linear for 5 outputs": {"packed": torch.zeros(2, 8, 16)},
    "num_outputs >= 0": {"num_outputs": -1},
    "bias of 5 elements": {"bias": torch.zeros(4)},
    "bias of dtype float32": {"bias": torch.zeros(5, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_alike(message: str) -> None:
    given = {**make_inputs(2, 8, 5), **BAD[message]}
    check_bad_input(f"packed_linear: expected {message}", packed_linear, **given)


def test_gradients_are_refused() -> None:
    given = make_inputs(2, 8, 5)
    given["x"].requires_grad_()
    check_bad_input(
        "packed_linear: expected operands that need no gradient", packed_linear, **given
    )
