"""Plugin of pytest (-p): tests/ops on the CUDA operators, threads in the order MOR_SIMT_ORDER."""

import ctypes
import os

import pytest

import mor.ops  # noqa: F401 - loads the library

ctypes.CDLL(os.environ["MOR_OPS_LIBRARY"]).simt_set_order(
    ctypes.c_int64(int(os.environ["MOR_SIMT_ORDER"]))
)
#: Cases left to the CPU and the GPU: each takes the harness 5 to 60 s.
TOO_LARGE = ("prefill", "threads-ties-half-both-by-score")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    large = [i for i in items if any(f"[{case}-torch." in i.name for case in TOO_LARGE)]
    config.hook.pytest_deselected(items=large)
    items[:] = [i for i in items if i not in large]
