"""The harness finds the mistakes that it is for: one kernel of bindings/selftest.cpp each."""

import pytest
import torch
from simt import Kernels

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


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused(kernels: Kernels, name: str) -> None:
    with pytest.raises(RuntimeError, match=MISTAKES[name]):
        kernels.call(f"selftest_{name}", torch.zeros(64, dtype=torch.int32))


@pytest.mark.parametrize("name", RACES)
def test_race_is_reported(race_kernels: Kernels, name: str) -> None:
    with pytest.raises(RuntimeError, match=RACES[name]):
        race_kernels.call(f"selftest_{name}", torch.zeros(64, dtype=torch.int32))


def test_async_copy_lands_when_waited_for(kernels: Kernels) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    source = torch.arange(128, dtype=torch.int32)
    kernels.call("selftest_copy_without_wait", source, out)
    assert (out == -1).all()  # poison: nothing has landed


def test_cub_runs(kernels: Kernels) -> None:
    values = torch.randint(-1000, 1000, (256,), generator=torch.Generator().manual_seed(0))
    out = torch.zeros(512, dtype=torch.int32)
    kernels.call("selftest_sort_and_scan", values.int(), out)
    want = values.int().sort().values
    assert torch.equal(out[:256], want)
    assert torch.equal(out[256:], (want.cumsum(0) - want).int())
