"""Fixtures for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

#: As many workers as cores: each computes in one thread, and so do the processes it starts.
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models too small for two threads, and for what must compute as another process does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that broke the device ends its worker, not every test after it: xdist starts one."""
    if torch.cuda.is_initialized() and IN_WORKER:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
