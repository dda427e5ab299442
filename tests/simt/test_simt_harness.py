"""The harness finds the mistakes that it is for: one kernel of selftest.cpp each."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from builds import build, environment
from torch import Tensor

# What every build refuses, whatever the order.
MISTAKES = {
    "divergent_barrier": "divergent barrier: reached at selftest.cpp:.* and at selftest.cpp:",
    "barrier_after_return": "returned",
    "shuffle_with_lanes_missing": "shfl.down at selftest.cpp:.* which has returned|deadlock",
    "different_collectives": "lanes of one warp meet in different collectives",
    "too_much_shared": "50176 bytes of dynamic shared memory, allowed 49152",
}
# What only the race checker sees.
RACES = {
    "missing_barrier": "race on shared memory: write .* read .* selftest.cpp:",
    "missing_syncwarp": "race on shared memory: write .* read .* selftest.cpp:",
    "blocks_write_one_word": "race on global memory: write .* of block #0 .* write .* of block #1",
    "unwritten_shared": "shared memory never written in this block: read by thread",
}
PAST_THE_END = """
import ctypes, sys, torch
values = torch.zeros(64, dtype=torch.int32)  # which must live until the call
ctypes.CDLL(sys.argv[1]).selftest_past_the_end(ctypes.c_void_p(values.data_ptr()))
"""


def call(build_name: str, order: int, name: str, *tensors: Tensor) -> None:
    """Calls selftest_`name`; raises RuntimeError with what the harness found."""
    library = ctypes.CDLL(str(build(build_name, "selftest")))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_set_order(ctypes.c_int64(order))
    if getattr(library, f"selftest_{name}")(*(ctypes.c_void_p(t.data_ptr()) for t in tensors)):
        raise RuntimeError(library.simt_error().decode())


@pytest.fixture(params=["plain-0", "plain-1", "plain-2", "race-0"])
def kernels(request: pytest.FixtureRequest) -> tuple[str, int]:
    name, order = request.param.split("-")
    return name, int(order)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused(kernels: tuple[str, int], name: str) -> None:
    with pytest.raises(RuntimeError, match=MISTAKES[name]):
        call(*kernels, name, torch.zeros(64, dtype=torch.int32))


@pytest.mark.parametrize("name", RACES)
def test_race_is_reported(name: str) -> None:
    with pytest.raises(RuntimeError, match=RACES[name]):
        call("race", 0, name, torch.zeros(64, dtype=torch.int32))


def test_async_copy_lands_when_waited_for(kernels: tuple[str, int]) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    source = torch.arange(128, dtype=torch.int32)
    call(*kernels, "copy_without_wait", source, out)
    assert (out == -1).all()  # poison: nothing has landed


def test_cub_runs(kernels: tuple[str, int]) -> None:
    values = torch.randint(-1000, 1000, (256,), generator=torch.Generator().manual_seed(0)).int()
    out = torch.zeros(512, dtype=torch.int32)
    call(*kernels, "sort_and_scan", values, out)
    want = values.sort().values
    assert torch.equal(out[:256], want)
    assert torch.equal(out[256:], (want.cumsum(0) - want).int())


@pytest.mark.clang
def test_write_past_the_end_is_found() -> None:
    library = build("asan", "selftest")
    chosen = environment(library, sanitizers=True)
    chosen["ASAN_OPTIONS"] += ":symbolize=0"  # which would name the source and not the library
    command = [sys.executable, "-c", PAST_THE_END, library]
    done = subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "selftest_asan.so" in done.stderr
