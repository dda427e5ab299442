import pytest
import torch
from simt import Kernels, in_harness, inputs_of
from test_gather_tokens import CASES
from torch import Tensor

from mor.ops.gather_tokens import reference

CASES_BY_ID = in_harness(CASES)
SHAPES = {
    "one": (1, 1, 1),
    "odd": (7, 5, 33),
    "wide": (40, 90, 64),
    "many-chunks": (3, 4, 700),
    "none": (3, 0, 4),
}


def check(kernels: Kernels, x: Tensor, rows: Tensor) -> None:
    width, size = x.shape[1], x.element_size()
    y = torch.empty(len(rows), width, dtype=x.dtype)
    kernels.call("gather_tokens", x, rows, y, len(rows), x.stride(0) * size, width * size)
    assert torch.equal(y, reference(x, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES_BY_ID)
def test_table_of_the_cpu(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    check(kernels, **inputs_of(CASES_BY_ID[case], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layout", ["packed", "right-half", "aligned-rows", "shifted"])
def test_gather_tokens(
    kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    num_rows, num_taken, width = shape
    generator = torch.Generator().manual_seed(0)
    stride, first = {
        "packed": (width, 0),
        "right-half": (2 * width, width),
        "aligned-rows": (width + -width % 16, 0),  # however long they are
        "shifted": (width + 16 + -width % 16, 1),
    }[layout]
    x = torch.randint(-99, 99, (num_rows, stride), generator=generator).to(dtype)
    x = x[:, first : first + width]
    check(kernels, x, torch.randint(0, num_rows, (num_taken,), generator=generator))
