"""docs/performance.md has the figures of benchmarks/results, and can be read in one sitting."""

import json
import re

import pytest

from tools.performance_page import PAGE, TABLES, Machine, read_machines, render

PROSE = re.compile(r"<!-- table .*?<!-- end -->", re.DOTALL)


def folder_with(tmp_path, name, facts, rows):
    (tmp_path / name).mkdir(exist_ok=True)
    table = {"machine": {"torch": "2.13.0", "commit": "abc", **facts}, "rows": rows}
    (tmp_path / name / "gather_tokens.json").write_text(json.dumps(table))


def test_page_and_json_files_agree():
    page = PAGE.read_text()
    assert render(page, read_machines()) == page, "run make performance-page"


def test_every_table_is_on_the_page():
    assert re.findall(r"<!-- table ([\w ]+) -->", PAGE.read_text()) == [*TABLES]


def test_prose_is_short_and_its_figures_stand_in_tables():
    """A new machine lengthens the tables, which nobody reads from end to end, but not the prose."""
    prose = PROSE.sub("", PAGE.read_text())
    assert len(re.findall(r"\S*\w\S*", prose)) <= 600
    assert not re.findall(r"\b\d+\.\d+\b", prose)


def test_a_range_spans_the_sizes_and_a_gpu_gets_its_column_after_the_cpus(tmp_path):
    cpu = {"cpu": "Some(R) CPU @ 2.20GHz", "threads": 2, "instruction_set": "avx2"}
    rows = [
        {
            "shape": "small",
            "dtype": "bfloat16",
            "pass": "forward",
            "x best": 1.5,
            "x limit mm": 0.5,
        },
        {"shape": "large", "dtype": "bfloat16", "pass": "forward", "x best": 12.4},
    ]
    folder_with(tmp_path, "b-cpu", cpu, rows)
    folder_with(tmp_path, "a-gpu", cpu | {"gpu": "NVIDIA X"}, rows[:1])
    machines = read_machines(tmp_path)
    assert TABLES["best"](machines).splitlines()[::2] == [
        "| operator | what | Some, 2 threads | NVIDIA X |",
        "| `gather_tokens` | bfloat16, forward | 1.50\N{EN DASH}12 | 1.50 |",
    ]
    assert TABLES["limits"](machines).endswith("| bfloat16, forward, `mm` | 0.50 | 0.50 |")


def test_a_json_file_outside_a_machines_folder_is_refused(tmp_path):
    (tmp_path / "gather_tokens.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"folder for each machine, got \['gather_tokens.json'\]"):
        read_machines(tmp_path)


def test_an_unknown_table_is_refused():
    with pytest.raises(SystemExit, match="got 'speed'"):
        render("<!-- table speed -->\n<!-- end -->", [Machine("m", {}, [], {})])
