"""Compiles the CUDA operators for the CPU, once for all tests and workers of a checkout."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.building import only_one_builds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: What tests/ops has for the CUDA operators; a compiler of torch.compile knows the CPU's library.
SELECTED = "not cuda and not cpu_kernels and not unsanitized"
# g++ 12 lacks -shared-libasan and takes more than ten minutes for the kernels under sanitizers.
NEEDS_CLANG = "the sanitizers need clang++ (Debian: clang-19 libclang-rt-19-dev)"
# Python keeps memory until it ends; fake stacks of fibers take half the time.
ASAN_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0"


def compiler() -> str | None:
    """The first of the compilers known to build the kernels."""
    return next(filter(shutil.which, ("clang++-19", "clang++", "g++")), None)


# One for each compiler, so that installing another does not throw the first one's away.
BUILD_FOLDER = ROOT / "build" / "simt" / str(compiler())


@functools.cache
def build(name: str, library: str = "_ops") -> Path:
    """Compiles what changed and returns `library` (or "selftest") of the build of this name.

    plain gives wrong results for wrong synchronisation in some order of the threads, race reports
    it, asan reports what leaves its bounds. Skips the test where that is impossible.
    """
    if platform.machine() != "x86_64":
        pytest.skip("the SIMT harness switches stacks on x86-64 only")
    # The virtual environment has a ninja, which `make test` does not put on PATH.
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shutil.which("cmake") or not ninja or compiler() is None:
        pytest.skip("no cmake, ninja or C++ compiler")
    if name == "asan" and compiler() == "g++":
        pytest.skip(NEEDS_CLANG)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    headers = "include/cuda_runtime_api.h", "include/cccl/cub"  # CUDA 12 keeps CUB elsewhere
    if not any(home and all((Path(home) / h).exists() for h in headers) for home in homes):
        pytest.skip("no headers of CUDA 13 (set CUDA_HOME)")
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options += [f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append(f"-DMOR_TORCH_DIR={Path(torch.__file__).parent}")
    options.append("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")  # for test_simt_mutations.py
    with only_one_builds(BUILD_FOLDER):
        for command in (
            ["cmake", "-S", HERE, "-B", BUILD_FOLDER, *options],
            ["cmake", "--build", BUILD_FOLDER, "--target", f"{library}_{name}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.fail(f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False)
    return BUILD_FOLDER / f"{library}_{name}.so"


def environment(library: Path, order: int = 0, sanitizers: bool = False) -> dict[str, str]:
    """What a process needs whose `mor.ops` loads the library, its threads in this order."""
    chosen = {
        "MOR_OPS_LIBRARY": str(library),
        "MOR_SIMT_ORDER": str(order),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if sanitizers:
        chosen |= {"LD_PRELOAD": sanitizer_runtime(), "ASAN_OPTIONS": ASAN_OPTIONS}
    return chosen


def sanitizer_runtime() -> str:
    """The library that must be loaded before Python; skips where the compiler lacks it."""
    for name in ("libclang_rt.asan-x86_64.so", "libasan.so"):
        command = [compiler() or "c++", f"-print-file-name={name}"]
        runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if Path(runtime).is_absolute():
            return runtime
    pytest.skip("the compiler has no shared AddressSanitizer (Debian: libclang-rt-19-dev)")
