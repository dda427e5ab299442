"""The operator tests once more, on CPU operators built with sanitizers: `make sanitize`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.building import only_one_builds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizers as Linux does"),
]
#: What a worker of pytest-xdist has, which computes in one thread: these tests are about threads.
OF_A_WORKER = ("PYTEST_XDIST_WORKER", "OMP_NUM_THREADS")
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
TARGETS = {"address": ["_ops", "_host"], "thread": ["_ops"]}  # the scheduler has no threads
OPTIONS = {
    # Python frees nothing at its end; PyTorch and Python may hand memory across.
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # libtsan takes a thread's copy of a thread_local variable that lies 16 bytes into a page for a
    # block of glibc 2.19, whose size stood before it. It would forget as much memory as whatever
    # stands there says, and die of it: google/sanitizers#1322.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:intercept_tls_get_addr=0:"
    f"suppressions={HERE / 'thread_suppressions.txt'}",
}
BUGS = {
    ("address", "past_the_end"): "AddressSanitizer: heap-buffer-overflow",
    ("address", "signed_overflow"): "runtime error: signed integer overflow",
    ("thread", "race"): "ThreadSanitizer: data race",
}
CALL = """
import sys, instrumented, torch, mor
getattr(torch.ops.mor_seeded_bugs, sys.argv[1])(torch.ones(1024, dtype=torch.int64))
"""
# The only free places for `inside` of parallel_for.h lie 16 bytes into a page, after a pointer.
THREAD_LOCAL = """
import ctypes, instrumented, torch, mor
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [malloc(16) for _ in range(200_000)]
for block in blocks:
    (ctypes.c_uint64 * 2).from_address(block)[:] = blocks[0], 0x2000
for block in blocks:
    if block % 4096 == 16:
        free(block)
x, rows = torch.ones(6, 4), torch.arange(6)
for _ in range(100):
    torch.ops.mor.gather_tokens(x, rows)
"""


@pytest.fixture(scope="module")
def sanitizer(request: pytest.FixtureRequest) -> str:
    """Builds what changed of the operators for one sanitizer."""
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} to build the operators with")
    name: str = request.param
    folder = ROOT / "build" / f"sanitize-{name}"
    options = [f"-DMOR_SANITIZE={name}", "-DMOR_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    options.append(f"-Dpybind11_DIR={pybind.stdout.strip()}")
    commands = (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_CXX_COMPILER=g++", *options],
        ["cmake", "--build", folder, "--target", *TARGETS[name]],
    )
    with only_one_builds(folder):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                output = done.stdout[-4000:] + done.stderr[-4000:]
                pytest.fail(f"{command}\n{output}", pytrace=False)
    return name


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The C++ runtime with it, or the sanitizer does not find what throws exceptions.
    libraries = (RUNTIMES[sanitizer], "libstdc++.so")
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in libraries
    ]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in OF_A_WORKER},
        **OPTIONS,
        "LD_PRELOAD": ":".join(found),
        "MOR_INSTRUMENTED": str(ROOT / "build" / f"sanitize-{sanitizer}"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), *sys.path]),
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("sanitizer", "bug"), BUGS, indirect=["sanitizer"])
def test_seeded_bug_is_found(sanitizer: str, bug: str) -> None:
    done = run(sanitizer, "-c", CALL, bug)
    assert done.returncode != 0, done.stdout[-4000:]
    assert BUGS[sanitizer, bug] in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("sanitizer", ["thread"], indirect=True)
def test_thread_local_after_a_pointer_is_no_huge_block(sanitizer: str) -> None:
    done = run(sanitizer, "-c", THREAD_LOCAL)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("sanitizer", ["address"], indirect=True)
def test_scheduler(sanitizer: str) -> None:
    """Its 100,000 random operations, too."""
    done = run(
        sanitizer, "-m", "pytest", "-qx", "-p", "instrumented", "-p", "no:cacheprovider",
        "tests/host",
    )  # fmt: skip
    print(done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("sanitizer", RUNTIMES, indirect=True)
def test_operators(sanitizer: str) -> None:
    options = [
        "-qx",
        "--capture=sys",
        "-p",
        "instrumented",
        "-p",
        "no:cacheprovider",
        "-m",
        "not unsanitized",
    ]
    done = run(sanitizer, "-m", "pytest", *options, "tests/ops")
    print(done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-8000:]
