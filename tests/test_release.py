"""What a release carries beside the code: citation, licences, forms for issues."""

from pathlib import Path

import tomllib
import yaml
from packaging.licenses import canonicalize_license_expression

import mor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == mor.__version__
    assert citation["license"] == canonicalize_license_expression(PROJECT["license"])
    (paper,) = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_licences_of_what_a_wheel_contains_are_in_it():
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    others = (ROOT / "LICENSE-THIRD-PARTY.txt").read_text()
    kernels = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.cuh"))
    build = (ROOT / "CMakeLists.txt").read_text() + kernels
    contained = {
        "pybind11_add_module": "== pybind11 ==",
        "MOR_TORCH_DIR}/include": "== PyTorch ==",
        "#include <cub/": "== CUB ==",
        "CMAKE_CUDA_RUNTIME_LIBRARY Static": "== CUDA runtime ==",
    }
    for used, named in contained.items():
        assert (used in build) == (named in others)


def test_forms_for_problems_ask_for_mor_info():
    forms = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug_report", "speed"):
        form = yaml.safe_load((forms / f"{name}.yml").read_text())
        required = [field for field in form["body"] if field.get("validations", {}).get("required")]
        assert "Output of `mor info`" in [field["attributes"]["label"] for field in required]
