from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import packed_linear
from mor.ops.packed_linear import pack_linear
from tests.cases.packed_linear import CASES, make_inputs
from tests.support.operators import (
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
)

pytestmark = pytest.mark.cpu_kernels  # CUDA has none
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_packed_linear(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        for op_case in CASES:
            check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("inputs", [1, 64, 577])
def test_a_row_depends_on_nothing_beside_it(inputs: int, isa: str, dtype: torch.dtype) -> None:
    """To the last bit: any number of rows from 1 to 64, any place among them."""
    given = make_inputs(64, inputs, 100, dtype=dtype)
    x = given.pop("x")
    with instruction_set(isa):
        whole = packed_linear(x, **given)
        for count in range(1, 65):
            first = (65 - count) // 2
            part = packed_linear(x[first : first + count], **given)
            assert torch.equal(part, whole[first : first + count]), count


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


BAD_WEIGHTS = {
    r"weight of shape \[M, K\]": torch.zeros(4),
    "weight of dtype float32 or bfloat16, got float64": torch.zeros(4, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("message", BAD_WEIGHTS)
def test_a_bad_weight_is_not_packed(message: str) -> None:
    with pytest.raises(RuntimeError, match=f"pack_linear: expected {message}"):
        pack_linear(BAD_WEIGHTS[message])


BAD: dict[str, dict[str, Any]] = {
    r"x of shape \[N, K\]": {"x": torch.zeros(4)},
    "x of dtype float32 or bfloat16, got float64": {"x": torch.zeros(2, 8, dtype=torch.float64)},
    "packed of dtype float32": {"packed": torch.zeros(1, 8, 16, dtype=torch.bfloat16)},
    "packed of pack_linear for 5 outputs": {"packed": torch.zeros(2, 8, 16)},
    "num_outputs >= 0": {"num_outputs": -1},
    "bias of 5 elements": {"bias": torch.zeros(4)},
    "bias of dtype float32": {"bias": torch.zeros(5, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    given = {**make_inputs(2, 8, 5), **BAD[message]}
    check_bad_input(f"packed_linear: expected {message}", packed_linear, **given)


@pytest.mark.parametrize("name", ["x", "packed", "bias"])
def test_a_gradient_is_refused(name: str) -> None:
    given = make_inputs(2, 8, 5)
    given[name].requires_grad_()
    check_bad_input(
        "packed_linear: expected operands that need no gradient", packed_linear, **given
    )


@pytest.mark.unsanitized
def test_compiles() -> None:
    given = make_inputs(5, 65, 17)

    def doubled(**kwargs: Any) -> Tensor:
        return packed_linear(**kwargs) * 2

    torch.testing.assert_close(torch.compile(doubled, fullgraph=True)(**given), doubled(**given))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_packed_linear_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
