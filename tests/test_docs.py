"""README and docs: links lead somewhere (their examples run in `make docs-test`)."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import mor.ops
from mor import MoRConfig
from mor.models.swap import SWAPPABLE
from tools.hf_suite import EXPECTED

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_operators_page_has_every_parameter():
    text = (ROOT / "docs" / "operators.md").read_text()
    for name in mor.ops.__all__:
        shown = re.search(rf"^{name}\((.*?)\) ->", text, re.MULTILINE | re.DOTALL)
        assert shown, f"{name} has no signature"
        for parameter in inspect.signature(getattr(mor.ops, name)).parameters:
            assert re.search(rf"\b{parameter}\b", shown[1]), f"{name}: {parameter}"


def test_models_page_has_every_option_with_its_default():
    """Cells with several options have as many defaults, in their order."""
    table = (ROOT / "docs" / "models.md").read_text().partition("| option of `MoRConfig`")[2]
    shown = {}
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        options, defaults = (re.findall(r"`([^`]*)`", cell) for cell in row.split("|")[1:3])
        shown |= zip(options, defaults, strict=True)
    own = [field for field in fields(MoRConfig) if field.name in MoRConfig.__annotations__]
    assert shown == {field.name: str(field.default) for field in own if field.init}


def test_models_page_lists_what_can_be_swapped():
    text = (ROOT / "docs" / "models.md").read_text()
    listed = text.partition("reproduces, padded and cached:\n")[2].partition(". Others")[0]
    assert re.findall(r"`(\w+)`", listed) == list(SWAPPABLE)


def test_developers_page_lists_what_hugging_faces_tests_cannot_hold():
    table = (ROOT / "DEVELOPERS.md").read_text().partition("| test of theirs |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    listed = {name: why.strip() for _, name, why, _ in (row.split("|") for row in rows)}
    assert {name.strip(" `"): why for name, why in listed.items()} == EXPECTED
