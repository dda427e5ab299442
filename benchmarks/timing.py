"""Seconds per call of several candidates, on the CPU by the clock, on CUDA by events."""

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_threads", "interleave"]

#: Over twice the L2 cache of any GPU so far; writing it leaves nothing of the operands there.
FLUSH_BYTES = 256 << 20
#: Calls in one window on CUDA, where each is preceded by a flush.
MOST_CUDA_CALLS = 20


def interleave(
    candidates: dict[str, Callable[[], Any]], repeats: int, seconds: float = 0.05
) -> dict[str, float]:
    """Median seconds per call of each candidate, all timed in turn so that drift hits them alike.

    On a CUDA default device the time is that between two events on the stream, with cold L2.

    Args:
        candidates: name to a function without arguments.
        repeats: rounds; in each, every candidate runs for about `seconds`.
        seconds: length of one timing window.
    """
    on_cuda = torch.get_default_device().type == "cuda"
    window, most = (_cuda_window, MOST_CUDA_CALLS) if on_cuda else (_cpu_window, 10**9)
    calls = {}
    for name, function in candidates.items():
        function()
        once = max(window(function, 1), 1e-7)
        calls[name] = min(max(1, int(seconds / once)), most)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            times[name].append(window(function, calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def at_threads(function: Callable[[], Any], repeats: int, seconds: float) -> dict[int, float]:
    """Median seconds per call with 1 thread and with all that torch was given, in turn."""
    most = torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], most: []}
    try:
        for _ in range(repeats):
            for threads, found in times.items():
                torch.set_num_threads(threads)
                found.append(interleave({"": function}, 1, seconds)[""])
    finally:
        torch.set_num_threads(most)
    return {threads: statistics.median(found) for threads, found in times.items()}


def _cpu_window(function: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _cuda_window(function: Callable[[], Any], calls: int) -> float:
    """The flush also keeps the device busy while the host queues the call: no launch gap counts."""
    flush, pairs = _flush_buffer(), []
    for _ in range(calls):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        function()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8)
