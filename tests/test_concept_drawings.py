"""The drawings of docs/pictures are those of their script."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def drawings():
    path = ROOT / "tools" / "concept_drawings.py"
    specification = importlib.util.spec_from_file_location("concept_drawings", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _drawn(path):
    # Texts and filled shapes: what does not depend on matplotlib's version.
    text = path.read_text()
    return re.findall(r"<text[^>]*>([^<]*)<", text), re.findall(r"fill: (#\w+)", text)


def test_committed_drawings_are_those_of_the_script(drawings, tmp_path):
    for path in drawings.write(tmp_path):
        assert _drawn(path) == _drawn(ROOT / "docs" / "pictures" / path.name)


def test_every_drawing_stands_in_a_page(drawings):
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name in drawings.DRAWINGS:
        assert re.search(rf"!\[[^\]]+\]\(pictures/{name}\.svg\)", pages), name
