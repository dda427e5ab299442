"""mor.catalogue: what it names exists, and README's table is made of it."""

import ast
import inspect
import operator
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

import mor.modules
import mor.systems
from mor.catalogue import SYSTEMS, as_markdown
from mor.cli import app

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_a_row_names_exists(system):
    assert issubclass(operator.attrgetter(system.module.removeprefix("mor."))(mor), nn.Module)
    name, given = system.call.removeprefix("mor.").rstrip(")").split("(")
    arguments = ast.parse(f"f({given})", mode="eval").body
    keywords = {word.arg: ast.literal_eval(word.value) for word in arguments.keywords}
    signature = inspect.signature(operator.attrgetter(name)(mor))
    signature.bind(*[None] * len(arguments.args), **keywords)  # DynaMoE's lacked num_experts
    files = [*system.tests, *system.demonstrations, *system.figures]
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_system_has_a_row():
    calls = {name for name in mor.systems.__all__ if name.startswith("apply_")}
    assert {f"mor.{name}" for name in calls} == {
        system.call.partition("(")[0] for system in SYSTEMS
    }


def test_a_method_named_in_a_row_had_no_paper():
    """CA-ToMe's stood in docstrings alone."""
    for system in SYSTEMS:
        assert len(system.papers) == len(system.name.split(","))


def test_readme_has_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert as_markdown() in readme, "python -c 'import mor.catalogue as c; print(c.as_markdown())'"


def test_the_command_lists_every_system():
    result = CliRunner().invoke(app, ["info", "--systems"])
    assert result.exit_code == 0
    for system in SYSTEMS:
        for text in (system.name, system.module, system.call, *system.tests, *system.figures):
            assert text in result.stdout
        assert all(f"https://arxiv.org/abs/{paper}" in result.stdout for paper in system.papers)
