"""Writes the tables of docs/performance.md and others from benchmarks/results/MACHINE/OP.json.

    python tools/performance_page.py          # rewrite the tables, nothing else of a page
    python tools/performance_page.py --check  # fail if a page and the JSON files differ

A table stands between `<!-- table NAME -->` and `<!-- end -->`; TABLES says what each NAME holds.
It needs neither torch nor mor, so it runs wherever the JSON files are. Over 300 lines, a third of
them the aims that tables of targets quote.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("performance", "serving", "sister-systems")]
RESULTS = ROOT / "benchmarks" / "results"
#: What tells apart the lines of one operator that a reader compares; sizes are joined to a range.
VARIANTS = ("dtype", "pass", "form", "kind")
#: Benchmarks of whole models, and of a call alone, have tables of their own. train_bf16 is one too.
MODELS = ("train", "generate")
#: Columns of such a table beside the descriptions and the ratios, whose names begin with "x ".
FIGURES = ("time ratio", "FLOPs ratio", "FLOPs", "time / FLOPs", "ms a token", "tokens/s")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A number that was aimed at.

    Attributes:
        what: was measured.
        aim: in words.
        benchmark: whose JSON file has it.
        only: text of its lines, as for --only.
        figures: columns of these lines, and how a value of each is written.
    """

    what: str
    aim: str
    benchmark: str
    only: str
    figures: Sequence[tuple[str, str]]


_RATIO = (("x best", "{:.2f}"),)
_AUTHORS = (("x authors", "{:.2f}"),)
_OF_BOUND = (*_RATIO, ("x limit bound", "{:.2f} of the bound"))
_OF_BEST = (("x best", "{:.2f} of the best"), ("predicted", "simulator {:.2f}"))
_MIXED = "`auto` over the best of lock-step and fixed shares, and the simulator's time over ours; "

SERVING = [
    *(
        Target(
            f"MoR-{recursions} over the dense model in the same engine, 32 sequences, uniform "
            "depths",
            "0.95 of the bound",
            "serving",
            f"throughput MoR-{recursions} uniform 32 float32",
            _OF_BOUND,
        )
        for recursions in (2, 3, 4)
    ),
    Target(
        "the same, time outside the model and the sampler", "3%", "serving",
        "throughput", [("host", "{:.1%}")],
    ),
    Target(
        "the dense model over `generate`, 1 sequence", "1", "serving",
        "generate Llama 1 float32", _RATIO,
    ),
    Target(
        "the dense model over `generate`, 32 sequences", "1.3", "serving",
        "generate Llama 32 float32", _RATIO,
    ),
    Target(
        f"{_MIXED}4,096 words, 8 sequences, uniform depths", "0.97, 0.9 to 1.1", "serving",
        "policy 4096 uniform 8 float32", _OF_BEST,
    ),
    Target(
        f"{_MIXED}49,152 words, 16 sequences, 80% shallow", "0.97, 0.9 to 1.1", "serving",
        "policy 49152 shallow 16 float32", _OF_BEST,
    ),
    Target(
        "first token after a prompt of 1,024 that is cached, over that of one that is not", "15%",
        "serving", "prefix MoR-3 1024 float32", [("of a miss", "{:.1%}")],
    ),
    Target(
        "99th percentile of the time between tokens while a prompt of 2,048 enters, over that "
        "while none does", "2", "serving",
        "chunked MoR-3 2048 8 float32", [("p99 of alone", "{:.2f}")],
    ),
    *(
        Target(
            "`packed_linear`, 1 to 32 rows, over the faster of PyTorch's linear and oneDNN's "
            f"prepacked form, {dtype}", "1.3", "packed_linear", dtype, _RATIO,
        )
        for dtype in ("float32", "bfloat16")
    ),
]  # fmt: skip

SISTERS = [
    Target(
        "ToMe/tomesd call (match, merge, attention on half, unmerge), 1,024 and 4,096 tokens, over "
        "PyPI's `tomesd` with SDPA", "1.5", "token_merging", "call", _AUTHORS,
    ),
    Target("the match alone", "3", "token_merging", "match", _AUTHORS),
    Target(
        "ViT-B/16 with ToMe, r = 13, 8 images: images/s of the bound by executed token-layers",
        "0.9", "token_merging", "ViT-B/16 8 images", [("x limit token-layers", "{:.2f}")],
    ),
    Target(
        "p-MoD layer at the published mean budget: share of the time over that of the FLOPs",
        "at most 1.15", "vision_layers", "PMoD 0.5375", [("time / FLOPs", "{:.2f}")],
    ),
    Target(
        "VideoLLM-MoD layer at the published ratio: the same", "none", "vision_layers",
        "VideoMoD 0.2", [("time / FLOPs", "{:.2f}")],
    ),
    Target(
        "`MixtureOfDepths` layer over PyPI's `mixture-of-depth`", "1.5", "mixture_of_depths",
        "MixtureOfDepths", _AUTHORS,
    ),
    Target(
        "`MixtureOfDepths` layer over a good eager form", "1.2", "mixture_of_depths",
        "MixtureOfDepths", _RATIO,
    ),
]  # fmt: skip


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
            sys.exit(f"expected a table of {sorted(TABLES)}, got {found[1]!r}")
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
        machines = [machine for machine in machines if "clock" not in machine.facts]
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


def target_table(targets: Sequence[Target]) -> Callable[[list[Machine]], str]:
    """A table of what was aimed at and what each machine reached, with the file that has it."""

    def table(machines: list[Machine]) -> str:
        return markdown(
            ["what", "aim", "figure", "`bench_NAME.py --only`"],
            [
                [
                    target.what,
                    target.aim,
                    "; ".join(figures(target, machine.tables[target.benchmark])),
                    f'`{target.benchmark}`, `"{target.only}"`',
                ]
                for target in targets
                for machine in machines
                if target.benchmark in machine.tables
            ],
        )

    return table


def figures(target: Target, rows: Rows) -> Iterable[str]:
    """Each figure of a target, as a range over its lines."""
    for column, form in target.figures:
        values = sorted(row[column] for row in rows if column in row and target.only in label(row))
        ends = dict.fromkeys(map(form.format, values[:1] + values[-1:]))
        yield "\N{EN DASH}".join(ends) or "not measured"


def label(row: dict[str, Any]) -> str:
    """The words of a line, by which --only chooses it."""
    return " ".join(str(value) for value in row.values() if not isinstance(value, float))


TABLES: dict[str, Callable[[list[Machine]], str]] = {
    "machines": machine_table,
    "best": operator_table("x best"),
    "authors": operator_table("x authors"),
    "limits": operator_table("x limit"),
    "calls": call_table,
    "models": model_tables,
    "serving": target_table(SERVING),
    "sisters": target_table(SISTERS),
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
    machines = read_machines()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        written = render(page, machines)
        if not args.check:
            path.write_text(written, encoding="utf-8")
        elif written != page:
            sys.exit(f"{path.name} differs from benchmarks/results: run make performance-page")


if __name__ == "__main__":
    main()
