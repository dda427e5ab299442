"""README and docs: links lead somewhere (their examples run in `make docs-test`)."""

import inspect
import re
from pathlib import Path

import mor.ops

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


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
