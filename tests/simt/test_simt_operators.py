"""The tests of tests/ops once more, on the CUDA operators compiled for the CPU.

`make test` runs of each test one case in SHARE_OF, of one dtype, under the race checker;
`make test-simt` everything: plain in several thread orders, the race checker, AddressSanitizer with
UndefinedBehaviorSanitizer.
"""

import os
import subprocess
import sys

import pytest
from builds import ROOT, SELECTED, build, environment

FILES = sorted(path.name for path in (ROOT / "tests/ops").glob("test_*.py"))
#: Two processes, for two workers, of about as much work.
SHARES = {
    "attention": [f for f in FILES if "attention" in f],
    "others": [f for f in FILES if "attention" not in f],
}
SHARE_OF = 5
BUILDS = ["plain-0", "plain-1", "plain-2", "race-0", "asan-0"]
# Attention in bfloat16, which takes the kernels with tensor cores, the rest in float32; without
# what says little more about a kernel and takes the race checker long.
SHARE = (
    "(attention and bfloat16 or not attention and torch.float32)"
    " and not instruction_set and not strides and not tiles-D600"
)


def run(files: list[str], library_and_order: str, *options: str) -> None:
    name, order = library_and_order.split("-")
    chosen = environment(build(name), int(order), sanitizers=name == "asan")
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "--capture=sys"]  # a sanitizer's report would be lost
    command += ["-m", SELECTED, *options, *(f"tests/ops/{f}" for f in files)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=inherited | chosen, cwd=ROOT, capture_output=True, text=True)
    none_selected = pytest.ExitCode.NO_TESTS_COLLECTED
    assert done.returncode in (0, none_selected), done.stdout[-6000:] + done.stderr[-6000:]


@pytest.mark.parametrize("share", SHARES)
def test_share(share: str) -> None:
    run(SHARES[share], "race-0", "-k", SHARE, f"--one-in={SHARE_OF}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "build_and_order",
    [pytest.param(b, marks=[pytest.mark.clang] * b.startswith("asan")) for b in BUILDS],
)
@pytest.mark.parametrize("file", FILES)
def test_everything(file: str, build_and_order: str) -> None:
    run([file], build_and_order)
