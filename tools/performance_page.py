"""Writes the tables of docs/performance.md from benchmarks/results/MACHINE/OP.json.

    python tools/performance_page.py          # rewrite the tables; nothing else of the page changes
    python tools/performance_page.py --check  # fail if the page and the JSON files differ

A table stands between `<!-- table NAME -->` and `<!-- end -->`; TABLES says what each NAME holds.
It needs neither torch nor mor, so it runs wherever the JSON files are.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
#: What tells apart the lines of one operator that a reader compares; sizes are joined to a range.
VARIANTS = ("dtype", "pass", "form", "kind")
#: Benchmarks of whole models, and of a call alone, have tables of their own. train_bf16 is one too.
MODELS = ("train", "generate", "serving")
#: Columns of such a table beside the descriptions and the ratios, whose names begin with "x ".
FIGURES = ("time ratio", "FLOPs ratio", "FLOPs", "time / FLOPs", "ms a token", "tokens/s")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Machine:
    """What one folder of benchmarks/results holds.

    Attributes:
        folder: its name.
        facts: what the benchmarks wrote about the machine, of the first file.
        commits: of all files, those that name one.
        tables: the lines of each benchmark, by the benchmark's name.
    """

    folder: str
    facts: dict[str, Any]
    commits: list[str]
    tables: dict[str, Rows]

    @property
    def has_gpu(self) -> bool:
        """Whether its figures are those of a GPU."""
        return "gpu" in self.facts

    @property
    def title(self) -> str:
        """The heading of its column."""
        if self.has_gpu:
            return str(self.facts["gpu"])
        cpu = re.sub(r"\((R|TM)\)| Processor| CPU|@.*", "", self.facts["cpu"]).strip()
        threads = self.facts["threads"]
        clock = f", {self.facts['clock']}" if "clock" in self.facts else ""
        return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}{clock}"


def read_machines(results: Path = RESULTS) -> list[Machine]:
    """Every machine's folder of `results`, CPUs first; a JSON file beside them is an error."""
    if stray := sorted(path.name for path in results.glob("*.json")):
        sys.exit(f"{results}: expected JSON files in a folder for each machine, got {stray}")
    machines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if folder.name == "reproduce":  # of benchmarks/reproduce, whose page is docs/results.md
            continue
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if files:
            facts = [found["machine"] for found in files.values()]
            commits = sorted({each["commit"] for each in facts if each["commit"]})
            tables = {name: found["rows"] for name, found in files.items()}
            machines.append(Machine(folder.name, facts[0], commits, tables))
    return sorted(machines, key=lambda machine: machine.has_gpu)


def render(page: str, machines: list[Machine]) -> str:
    """The page with every table written anew."""

    def table(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            sys.exit(f"{PAGE.name}: expected a table of {sorted(TABLES)}, got {found[1]!r}")
        return f"<!-- table {found[1]} -->\n\n{TABLES[found[1]](machines)}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w ]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def machine_table(machines: list[Machine]) -> str:
    """The machines, and which commits their figures are of."""
    return markdown(
        ["folder of `benchmarks/results`", "machine", "PyTorch", "commits"],
        [
            [
                f"`{machine.folder}`",
                f"{machine.title} ({machine.facts['instruction_set']})",
                machine.facts["torch"],
                ", ".join(machine.commits),
            ]
            for machine in machines
        ],
    )


def operator_table(ratio: str) -> Callable[[list[Machine]], str]:
    """A table of one ratio of every operator, as the range over its sizes on each machine."""

    def table(machines: list[Machine]) -> str:
        machines = [machine for machine in machines if any(map(is_operator, machine.tables))]
        lines: dict[tuple[str, str], dict[str, list[float]]] = {}
        for machine in machines:
            for name, rows in machine.tables.items():
                for row in rows if is_operator(name) else ():
                    variant = [str(row[key]) for key in VARIANTS if key in row]
                    for column, value in row.items():
                        if column.startswith(ratio):
                            limit = [f"`{column.removeprefix(ratio).strip()}`"]
                            what = ", ".join(variant + (limit if column != ratio else []))
                            found = lines.setdefault((f"`{name}`", what), {})
                            found.setdefault(machine.folder, []).append(value)
        cells = [
            [*label, *(span(found.get(machine.folder, ())) for machine in machines)]
            for label, found in sorted(lines.items())
        ]
        return markdown(["operator", "what", *(machine.title for machine in machines)], cells)

    return table


def is_operator(name: str) -> bool:
    """Whether a benchmark has its lines in the tables of the operators."""
    return name != "dispatch" and not name.startswith(MODELS)


def call_table(machines: list[Machine]) -> str:
    """Microseconds of the smallest call of every operator."""
    machines = [machine for machine in machines if "dispatch" in machine.tables]
    lines: dict[str, dict[str, str]] = {}
    for machine in machines:
        for row in machine.tables["dispatch"]:
            found = lines.setdefault(f"`{row['operator']}`", {})
            found[machine.folder] = f"{row['ours ms'] * 1e3:.1f}"
    cells = [
        [name, *(found.get(machine.folder, "") for machine in machines)]
        for name, found in sorted(lines.items())
    ]
    return markdown(["operator", *(machine.title for machine in machines)], cells)


def model_tables(machines: list[Machine]) -> str:
    """One table for each benchmark of whole models on each machine."""
    parts = []
    for machine in machines:
        for name, rows in machine.tables.items():
            if name.startswith(MODELS):
                path = f"benchmarks/results/{machine.folder}/{name}.json"
                parts.append(f"{machine.title} (`{path}`):\n\n{model_table(rows)}")
    return "\n\n".join(parts)


def model_table(rows: Rows) -> str:
    """The descriptions and ratios of a benchmark of whole models, line by line."""
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if column in FIGURES
        or column.startswith("x ")
        or not any(isinstance(row.get(column), float) for row in rows)
    ]
    cells = [[text(row.get(column, "")) for column in columns] for row in rows]
    return markdown(columns, cells)


TABLES: dict[str, Callable[[list[Machine]], str]] = {
    "machines": machine_table,
    "best": operator_table("x best"),
    "authors": operator_table("x authors"),
    "limits": operator_table("x limit"),
    "calls": call_table,
    "models": model_tables,
}


def markdown(heads: list[str], cells: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def span(values: Iterable[float]) -> str:
    """The smallest and the largest value, or the one that both are as printed."""
    values = sorted(values)
    ends = [text(float(value)) for value in values[:1] + values[-1:]]
    return "\N{EN DASH}".join(dict.fromkeys(ends))


def text(value: Any) -> str:
    """Two decimals below 10, none above."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    written = render(page, read_machines())
    if not args.check:
        PAGE.write_text(written, encoding="utf-8")
    elif written != page:
        sys.exit("docs/performance.md differs from benchmarks/results: run make performance-page")


if __name__ == "__main__":
    main()
