"""Starts a script in several processes, as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Finished(NamedTuple):
    """How a launch ended, and what it printed."""

    returncode: int
    output: str


def torchrun(*arguments: object, processes: int = 2, timeout: int = 240) -> Finished:
    """Runs `torchrun ARGUMENTS` with gloo on the CPU, all of it killed after `timeout` seconds.

    A failure shows the end of the output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started = subprocess.Popen(
        [sys.executable, *launcher, *(str(argument) for argument in arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Only a launcher that is asked to stop takes its processes with it.
        started.send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=60)
        raise AssertionError(f"no end after {timeout} s:\n{output[-4000:]}") from None
    if started.returncode:
        print(output[-6000:])
    return Finished(started.returncode, output)
