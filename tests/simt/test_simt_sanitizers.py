"""This folder's tests once more, in a process that loads the sanitizers before Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, UNDER_SANITIZERS, build, compiler

pytestmark = [
    pytest.mark.clang,
    pytest.mark.skipif(UNDER_SANITIZERS, reason="this is the inner run"),
]
PAST_THE_END = """
import sys, torch
from simt import Kernels
Kernels("asan", sys.argv[1], 0).call("selftest_past_the_end", torch.zeros(64, dtype=torch.int32))
"""


def sanitizer_environment() -> dict[str, str]:
    """What a process needs that loads an asan build; skips where the compiler lacks it."""
    for name in ("libclang_rt.asan-x86_64.so", "libasan.so"):
        command = [compiler() or "c++", f"-print-file-name={name}"]
        runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if Path(runtime).is_absolute():
            return {
                "MOR_SIMT_SANITIZERS": "1",
                "LD_PRELOAD": runtime,
                # Python keeps memory until it ends; fake stacks of fibers take half the time.
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            }
    pytest.skip("the compiler has no shared AddressSanitizer (Debian: libclang-rt-19-dev)")


def run(*arguments: str, asan_options: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | sanitizer_environment()
    environment["ASAN_OPTIONS"] += asan_options
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)


def test_write_past_the_end_is_found() -> None:
    # A symbolizer, where there is one, would name the source and not the library.
    done = run("-c", PAST_THE_END, str(build("asan")), asan_options=":symbolize=0")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "libsimt_asan.so" in done.stderr


def test_everything_under_sanitizers() -> None:
    build("asan")
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "asan", ".")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
