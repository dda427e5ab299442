"""Plugin of pytest (-p): tests/ops on the CUDA operators, threads in the order MOR_SIMT_ORDER."""

import collections
import ctypes
import os

import pytest

import mor.ops  # noqa: F401 - loads the library

ctypes.CDLL(os.environ["MOR_OPS_LIBRARY"]).simt_set_order(
    ctypes.c_int64(int(os.environ["MOR_SIMT_ORDER"]))
)
#: Cases left to the CPU and the GPU: each takes the harness 5 to 60 s.
TOO_LARGE = ("prefill", "threads-ties-half-both-by-score")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="of each test's cases, at least one")


# After what -k and -m select.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: collections.Counter[str] = collections.Counter()
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        large = any(f"[{case}-torch." in item.name for case in TOO_LARGE)
        chosen = not large and seen[test] % config.getoption("--one-in") == 0
        seen[test] += not large
        (kept if chosen else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
