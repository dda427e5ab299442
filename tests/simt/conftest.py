"""Builds the CUDA kernels for the CPU and hands every test of this folder each build.

Three builds, because none finds everything: plain in several thread orders (missing barriers), the
race checker, and (in a process of its own, test_simt_sanitizers.py) AddressSanitizer with
UndefinedBehaviorSanitizer.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simt import Kernels

from tests.support.building import only_one_builds

HERE = Path(__file__).parent
UNDER_SANITIZERS = "MOR_SIMT_SANITIZERS" in os.environ
BUILDS = ["asan"] if UNDER_SANITIZERS else ["plain-0", "plain-1", "plain-2", "race"]
# g++ 12 lacks -shared-libasan and takes more than ten minutes for the kernels under sanitizers.
NEEDS_CLANG = "the sanitizers need clang++ (Debian: clang-19 libclang-rt-19-dev)"
# "BUILD:LIBRARY": kernels with a seeded bug, see test_simt_mutations.py.
MUTANT = os.environ.get("MOR_SIMT_MUTANT")
if MUTANT is not None:
    BUILDS = [build for build in BUILDS if MUTANT.startswith(build.partition("-")[0])]


def compiler() -> str | None:
    """The first of the compilers known to build the kernels."""
    return next(filter(shutil.which, ("clang++-19", "clang++", "g++")), None)


# One for each compiler, so that installing another does not throw the first one's away.
BUILD_FOLDER = HERE.parents[1] / "build" / "simt" / str(compiler())


@functools.cache
def build(target: str) -> Path:
    """Compiles what changed and returns the library; skips the test where that is impossible."""
    if MUTANT is not None:
        built, _, library = MUTANT.partition(":")
        return Path(library) if built == target else pytest.skip(f"the mutant is a {built} build")
    if platform.machine() != "x86_64":
        pytest.skip("the SIMT harness switches stacks on x86-64 only")
    # The virtual environment has a ninja, which `make test` does not put on PATH.
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shutil.which("cmake") or not ninja or compiler() is None:
        pytest.skip("no cmake, ninja or C++ compiler")
    if target == "asan" and compiler() == "g++":
        pytest.skip(NEEDS_CLANG)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    headers = "include/cuda_runtime_api.h", "include/cccl/cub"  # CUDA 12 keeps CUB elsewhere
    if not any(home and all((Path(home) / h).exists() for h in headers) for home in homes):
        pytest.skip("no headers of CUDA 13 (set CUDA_HOME)")
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options.append(f"-DCMAKE_CXX_COMPILER={compiler()}")
    options.append("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")  # for test_simt_mutations.py
    with only_one_builds(BUILD_FOLDER):
        for command in (
            ["cmake", "-S", HERE, "-B", BUILD_FOLDER, *options],
            ["cmake", "--build", BUILD_FOLDER, "--target", f"simt_{target}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                message = f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
                pytest.fail(message, pytrace=False)
    return BUILD_FOLDER / f"libsimt_{target}.so"


@pytest.fixture
def race_kernels() -> Kernels:
    return Kernels("race", build("race"), 0)


@pytest.fixture
def plain_kernels() -> Kernels:
    return Kernels("plain", build("plain"), 0)


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    target, _, order = request.param.partition("-")
    return Kernels(target, build(target), int(order or 0))
