"""docs/performance.md has the figures of benchmarks/results, and can be read in one sitting."""

import json
import re

import pytest

from tools.performance_page import (
    PAGES,
    TABLES,
    Machine,
    Target,
    read_machines,
    render,
    target_table,
)

PROSE = re.compile(r"<!-- table .*?<!-- end -->", re.DOTALL)


def folder_with(tmp_path, name, facts, rows):
    (tmp_path / name).mkdir(exist_ok=True)
    table = {"machine": {"torch": "2.13.0", "commit": "abc", **facts}, "rows": rows}
    (tmp_path / name / "gather_tokens.json").write_text(json.dumps(table))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_and_json_files_agree(path):
    page = path.read_text()
    assert render(page, read_machines()) == page, "run make performance-page"


def test_every_table_is_on_a_page():
    text = "".join(path.read_text() for path in PAGES)
    assert re.findall(r"<!-- table ([\w ]+) -->", text) == [*TABLES]


def test_prose_is_short_and_its_figures_stand_in_tables():
    """A new machine lengthens the tables, which nobody reads from end to end, but not the prose."""
    prose = PROSE.sub("", PAGES[0].read_text())
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


def test_a_target_has_the_figures_of_its_lines_alone():
    rows = [
        {"row": "fast", "n": 1, "x best": 1.5, "host": 0.021},
        {"row": "fast", "n": 2, "x best": 1.25, "host": 0.03},
        {"row": "slow", "n": 1, "x best": 0.5},
    ]
    machines = [Machine("m", {}, [], {"bench": rows}), Machine("other", {}, [], {})]
    targets = [
        Target("speed", "1", "bench", "fast", [("x best", "{:.2f}"), ("host", "{:.1%}")]),
        Target("rest", "2", "bench", "none", [("x best", "{:.2f}")]),
    ]
    assert target_table(targets)(machines).splitlines()[2:] == [
        '| speed | 1 | 1.25\N{EN DASH}1.50; 2.1%\N{EN DASH}3.0% | `bench`, `"fast"` |',
        '| rest | 2 | not measured | `bench`, `"none"` |',
    ]
