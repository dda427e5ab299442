"""What every bench_*.py has: its options, a line of the table, the table, JSON.

A line says what was timed, then `ours`, the ratio to the authors' form (`x authors`), to the best
form of plain PyTorch (`x best`, named) and to what limits it (`x limit ...`): each the other's
time over ours, so above 1 ours is faster.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import folder_name, machine
from timing import at_threads, interleave

__all__ = [
    "DTYPES",
    "compiled",
    "dtype_name",
    "generator",
    "label",
    "line",
    "machine",
    "parse_args",
    "print_table",
    "report",
    "wanted",
]

DTYPES = (torch.float32, torch.bfloat16)
RESULTS = Path(__file__).parent / "results"
_options = argparse.Namespace(rows=[], left_out=set())  # and what parse_args finds


def parse_args(
    description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The options every benchmark has, and those that `add` puts into the parser."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="smallest sizes, one repeat: proves that it runs"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help="interleaved repeats, median taken (default 9)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--thread-time",
        action="store_true",
        help="the CPU time of one thread instead of the clock: for a machine with other work",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: CUDA events and cold L2")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only the lines with TEXT in their description, or, after '=', that are it; repeat",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--scaling", action="store_true", help="instead of peers: ours at 1 thread and at --threads"
    )
    instead.add_argument(
        "--profile", action="store_true", help="instead of peers: what ours spends its time on"
    )
    parser.add_argument("--limit", type=float, help="seconds after which no line is begun")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="FILE",
        help="write the table there, by default to benchmarks/results/MACHINE/NAME.json",
    )  # fmt: skip
    if add is not None:
        add(parser)
    args = parser.parse_args()
    if args.json == RESULTS and (args.scaling or args.profile):
        parser.error("--json of --scaling or --profile: expected a FILE beside the tables")
    if args.thread_time:
        if args.device != "cpu":
            parser.error(f"--thread-time: expected --device cpu, got {args.device}")
        args.threads = 1
        time.perf_counter = time.thread_time  # what is timed, an engine too, takes its times by it
    if args.smoke:
        args.repeats = 1
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.set_default_device(args.device)  # every tensor of a benchmark is made there
    vars(_options).update(vars(args), begin=time.monotonic())
    return args


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def generator(seed: int = 0) -> torch.Generator:
    """Random numbers for tensors on the device of --device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, afresh for every shape and dtype as a user's static model would.

    With --smoke the graph runs as it was traced: the minutes of C++ compilers would prove nothing.
    """
    torch._dynamo.reset()
    backend = "aot_eager" if _options.smoke else "inductor"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def label(row: dict[str, Any]) -> str:
    """The description of a line: what stands before its figures."""
    words = []
    for value in row.values():
        if isinstance(value, float):
            break
        words.append(str(value))
    return " ".join(words)


def wanted(what: dict[str, Any]) -> bool:
    """Whether --only and --limit leave this line in; ask before a costly preparation."""
    text = label(what)
    if _options.only and not any(
        text == only[1:] if only.startswith("=") else only in text for only in _options.only
    ):
        return False
    if _options.limit is not None and time.monotonic() - _options.begin > _options.limit:
        _options.left_out.add(text)
        return False
    return True


def line(
    what: dict[str, Any],
    candidates: dict[str, Callable[[], Any]],
    seconds: float = 0.05,
    work: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Adds a line to the table and returns it; empty if it is not wanted, or only profiled.

    Args:
        what: describes the line, as text and integers.
        candidates: "ours"; "authors"; "limit ...", which are no peers; the rest are plain forms, of
            which the best counts.
        seconds: see `interleave`.
        work: how much work ours does in units of that of a limit, by the limit's name. Then the
            ratio is the share of the limit's rate that is reached.
    """
    if not wanted(what):
        return {}
    row = dict(what)
    if _options.profile:
        _options.rows += [row | part for part in _profile(candidates["ours"])]
        return {}
    _options.rows.append(row)
    if _options.scaling:
        times_at = at_threads(candidates["ours"], _options.repeats, seconds)
        one, most = times_at[1], times_at[torch.get_num_threads()]
        row |= {"1 thread ms": one * 1e3, f"{torch.get_num_threads()} threads ms": most * 1e3}
        row["x threads"] = one / most
        return row
    times = interleave(candidates, _options.repeats, seconds)
    ours = times.pop("ours")
    limits = {name: times.pop(name) for name in [*times] if name.startswith("limit")}
    plain = {name: seconds for name, seconds in times.items() if name != "authors"}
    row["ours ms"] = ours * 1e3
    if "authors" in times:
        row |= {"authors ms": times["authors"] * 1e3, "x authors": times["authors"] / ours}
    if plain:
        best = min(plain, key=plain.__getitem__)
        row |= {"best ms": plain[best] * 1e3, "x best": plain[best] / ours, "best": best}
    for name, seconds in limits.items():
        row[f"x {name}"] = (work or {}).get(name, 1) * seconds / ours
    return row


def _profile(ours: Callable[[], Any], most: int = 12) -> list[dict[str, Any]]:
    """The operators that take most of the time of ours, by PyTorch's profiler."""
    ours()
    seconds = 0.1 if _options.smoke else 2
    calls, begin = 0, time.perf_counter()
    with torch.profiler.profile() as profiler:
        while time.perf_counter() - begin < seconds:
            ours()
            calls += 1
    on = "device" if torch.get_default_device().type == "cuda" else "cpu"
    events = [  # operators; their kernels have the same time once more
        (getattr(event, f"self_{on}_time_total"), event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU
    ]
    total = max(sum(spent for spent, _, _ in events), 1)
    return [
        {
            "operator": name,
            "calls": f"{count / calls:g}",
            "ms": spent / calls / 1e3,
            "share": spent / total,
        }
        for spent, count, name in sorted(events, reverse=True)[:most]
    ]


def report(name: str) -> None:
    """Prints the lines as an aligned table; writes them with --json."""
    found = machine()
    if _options.thread_time:
        found["clock"] = "thread time"
    print(f"{name}: {found}")
    print_table(_options.rows)
    if _options.left_out:
        print(f"{name}: {len(_options.left_out)} lines left out after {_options.limit:.0f} s")
    if path := _options.json:
        path = RESULTS / folder_name(found) / f"{name}.json" if path == RESULTS else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": found, "rows": _options.rows}, indent=1) + "\n")
        print(f"wrote {path}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned, a column for every key that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
