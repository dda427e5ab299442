"""Timing for bench_*.py: interleaved repeats in one process, medians, a table, a JSON file."""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parse_args(
    description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The options every benchmark has, and those that `add` puts into the parser."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="smallest sizes, one repeat: proves that it runs"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help="interleaved repeats, median taken (default 9)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 1
    torch.set_num_threads(args.threads)
    return args


def interleave(
    candidates: dict[str, Callable[[], Any]], repeats: int, seconds: float = 0.05
) -> dict[str, float]:
    """Median seconds per call of each candidate, all timed in turn so that drift hits them alike.

    Args:
        candidates: name to a function without arguments.
        repeats: rounds; in each, every candidate runs for about `seconds`.
        seconds: length of one timing window.
    """
    calls = {}
    for name, function in candidates.items():
        function()
        begin = time.perf_counter()
        function()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def machine() -> dict[str, Any]:
    """What a figure needs beside it."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_set": torch.ops.mor.instruction_set(""),
        "commit": commit,
    }


def report(name: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the rows as an aligned table and, with --save, writes them to results/NAME.json."""
    print(f"{name}: {machine()}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"wrote {path}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
