"""Holds what the operators have reached: every ratio of the lines below to its floor.

`make bench-check` measures the lines, again those with a ratio under its floor, and fails if one
stays there in TRIES. `--record` writes benchmarks/floors.json: MARGIN of the lowest of RUNS, on an
idle machine, for its instruction set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from harness import label, print_table

import mor.ops  # noqa: F401 - loads the library

HERE = Path(__file__).parent
FLOORS = HERE / "floors.json"
TRIES, RUNS, MARGIN, REPEATS = 3, 2, 0.8, 5
#: What of each benchmark is measured, as its --only.
LINES = {
    "bipartite_match": ["ViT-B", "SD 64x64"],
    "depth_attention": ["causal 2x2048 9/3", "sharing 1024 of 2x2048 9/3"],
    "dispatch": [""],
    "gather_tokens": ["[8, 1024, 576] 512"],
    "group_rows": ["32768 16 4 random", "16384 8 2 bool"],
    "kv_append": ["32 512 1", "32 8192 1"],
    "kv_gather": [""],
    "packed_linear": ["[1536, 576] 1 ", "[1536, 576] 16 "],
    "paged_depth_attention": ["ragged"],
    "round_trip": ["[8, 2048, 576]"],
    "route_threshold": ["8x2048"],
    "route_topk": ["8x2048 float32 random", "8x2048 bfloat16 random", "8x2048 float32 adversarial"],
    "scatter_tokens": ["[8, 1024, 576] 512"],
    "segment_reduce": ["[8192, 320] float32 weighted mean", "[8192, 320] bfloat16 weighted mean"],
    "token_choice": ["] 3 "],
}
Ratios = dict[str, float]  # by "line: ratio"


def measure(name: str, only: Iterable[str]) -> tuple[dict[str, Any], Ratios]:
    """The machine, and the ratios of a benchmark's lines."""
    print(f"{name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        command = [sys.executable, str(HERE / f"bench_{name}.py"), f"--repeats={REPEATS}"]
        command += [f"--json={path}", *(f"--only={text}" for text in only)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(path.read_text())
    return found["machine"], {
        f"{label(row)}: {ratio}": value
        for row in found["rows"]
        for ratio, value in row.items()
        if ratio.startswith("x ")
    }


def record(names: list[str]) -> None:
    known = json.loads(FLOORS.read_text()) if FLOORS.exists() else {}
    here = known.setdefault(instruction_set(), {"machine": {}, "floors": {}})
    for name in names:
        (machine, first), *others = (measure(name, LINES[name]) for _ in range(RUNS))
        lowest = {key: min(first[key], *(run[key] for _, run in others)) for key in first}
        floors = {key: round(MARGIN * value, 3) for key, value in lowest.items()}
        here["machine"] = machine
        here["floors"] = dict(sorted({**here["floors"], name: floors}.items()))
        FLOORS.write_text(json.dumps(known, indent=1) + "\n")
    print(f"wrote {FLOORS}")


def instruction_set() -> str:
    return torch.ops.mor.instruction_set("")


def below(reached: Ratios, floors: Ratios) -> list[str]:
    """What fell, or was not measured."""
    return [key for key, floor in floors.items() if reached.get(key, 0.0) < floor]


def check(names: list[str]) -> list[str]:
    """Prints the table; the ratios that fell."""
    recorded, rows, fell = json.loads(FLOORS.read_text()), [], []
    if instruction_set() not in recorded:
        print(f"nothing checked: no floors for {instruction_set()}, only for {[*recorded]}")
        return []
    here = recorded[instruction_set()]["floors"]
    for name in names:
        reached = measure(name, LINES[name])[1]
        floors: Ratios = here.get(name, {})
        for _ in range(TRIES - 1):
            if again := {f"={key.rpartition(': ')[0]}" for key in below(reached, floors)}:
                for key, value in measure(name, again)[1].items():
                    reached[key] = max(value, reached.get(key, 0.0))
        low = below(reached, floors)
        fell += [f"{name} {key}" for key in low]
        for key in reached | floors:
            row = {"line": f"{name} {key}", "ratio": reached.get(key, 0.0)}
            row["floor"] = floors.get(key, "none")
            rows.append(row | {"ok": "NO" if key in low else "yes" if key in floors else ""})
    print_table(rows)
    return fell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write the floors instead")
    parser.add_argument("--names", nargs="+", choices=LINES, default=[*LINES], help="only these")
    args = parser.parse_args()
    if args.record:
        record(args.names)
    elif not FLOORS.exists():
        sys.exit(f"no {FLOORS}: --record makes it, on an idle machine")
    elif fell := check(args.names):
        sys.exit("\n  ".join(["below their floors:", *fell]))


if __name__ == "__main__":
    main()
