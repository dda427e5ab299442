"""The machine code of the CUDA kernels keeps to kernels/budgets.json: no GPU needed."""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from machine_code import (
    BUDGETS,
    SHARED_KIB,
    Kernel,
    cuobjdump,
    kernels,
    resident_blocks,
    sizes_of,
)

import mor.ops  # noqa: F401 - loads the library

pytestmark = pytest.mark.xdist_group("machine_code")


@pytest.fixture(scope="module")
def built() -> list[Kernel]:
    if cuobjdump() is None:
        pytest.skip("nvidia-cuda-cuobjdump is not installed")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt (Debian: binutils) to read the names of kernels")
    library = next(p for p in torch.ops.loaded_libraries if Path(p).name == "_ops.so")
    found = kernels(Path(library))
    if not found:
        pytest.skip("built without nvcc: no machine code to inspect")
    return found


def test_every_kernel_has_a_budget_and_every_budget_a_kernel(built):
    without = sorted({kernel.name for kernel in built if kernel.budget is None})
    assert not without, f"no budget in kernels/budgets.json for {without}"
    used = [b["kernel"] for b in BUDGETS if any(kernel.budget is b for kernel in built)]
    assert used == [b["kernel"] for b in BUDGETS]


def test_nothing_spills(built):
    spills = [
        f"{kernel.architecture} {kernel.name}: {kernel.stack} bytes"
        for kernel in built
        if not fnmatchcase(kernel.name, "*<double*") and kernel.spills
    ]
    assert not spills


def test_registers_stay_in_the_budget(built):
    over = [
        f"{kernel.architecture} {kernel.name}: {kernel.registers} of {kernel.budget['registers']}"
        for kernel in built
        if kernel.registers > kernel.budget["registers"]
    ]
    assert not over


def test_shared_memory_stays_in_the_budget(built, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to measure dynamic shared memory with")
    sizes = sizes_of({kernel.layout for kernel in built if kernel.layout}, tmp_path)
    over = [
        f"{kernel.architecture} {kernel.name}: {used} of {kernel.budget['shared']} bytes"
        for kernel in built
        if (used := kernel.shared + sizes.get(kernel.layout, 0)) > kernel.budget["shared"]
    ]
    assert not over


def test_every_block_fits_the_shared_memory_of_sm_86():
    """99 KiB; only the backward of gradcheck's float64 with 256 head dimensions takes more."""
    larger = {b["kernel"] for b in BUDGETS if b["shared"] > 99 * 1024}
    assert larger == {f"depth_attention_grad_{of}_kernel<double, 256>" for of in ("q", "kv")}


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_budgets_give_the_stated_occupancy(architecture):
    fewer = [
        f"{budget['kernel']}: {blocks} blocks, not {stated}"
        for budget in BUDGETS
        for stated in [budget["blocks"][architecture != "sm_80"]]
        if (blocks := resident_blocks(budget, architecture)) < stated
    ]
    assert not fewer


def test_kernels_use_the_instructions_they_are_written_for(built):
    missing = [
        f"{kernel.architecture} {kernel.name}: {name}"
        for kernel in built
        for name in kernel.budget["instructions"]
        if not kernel.instructions[name]
    ]
    assert not missing
