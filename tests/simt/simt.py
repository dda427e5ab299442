"""The CUDA kernels compiled for the CPU (harness/simt.h), called with tensors."""

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.operators import OpCase

__all__ = ["DTYPES", "Kernels", "in_harness", "inputs_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Cases of tests/ops left to the CPU and the GPU, and what a build of the harness takes for each.
TOO_LARGE = {
    "prefill": "5 s",
    "threads-ties-half-both-by-score": "40 s (race checker)",
}
Argument = Any  # a tensor, a number, a dtype, None or ctypes' own


def in_harness(table: Iterable[OpCase]) -> dict[str, OpCase]:
    """The cases of a table of tests/ops that the harness runs, by their ids."""
    return {c.id: c for c in table if c.id not in TOO_LARGE}


def inputs_of(op_case: OpCase, dtype: torch.dtype) -> dict[str, Any]:
    return op_case.make(dtype, "cpu", torch.Generator().manual_seed(0))


class Kernels:
    """One build of the kernels (plain, race or asan) and the order in which its threads run.

    Attributes:
        build: name of the build.
    """

    def __init__(self, build: str, library: Path, order: int) -> None:
        self.build = build
        self._library = ctypes.CDLL(str(library))
        self._library.simt_error.restype = ctypes.c_char_p
        self._library.simt_set_order(ctypes.c_int64(order))

    def call(self, name: str, *args: Argument) -> None:
        """Calls a function of bindings/; raises RuntimeError with what the harness found."""
        if getattr(self._library, name)(*(_to_c(a) for a in args)) != 0:
            raise RuntimeError(self._library.simt_error().decode())


def _to_c(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        assert argument.is_cpu
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, torch.dtype):
        return ctypes.c_int64(DTYPES.index(argument))
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
