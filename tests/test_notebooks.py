"""The notebooks: clean as committed, and the first one shows what it promises when it is run."""

import json
import math
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mor.analysis.depth_page import COLOURS

pytestmark = pytest.mark.xdist_group("notebooks")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = ROOT / "notebooks" / "first_mor.ipynb"

# What the reader has seen, gathered in the notebook's own process after its last cell.
REPORT = """
import json
print(json.dumps({
    "losses": [column("lm_loss")[1], column("eval_loss")[1]],
    "dense_losses": [line["loss"] for line in dense_history if "loss" in line],
    "shares": [line["eval_selected_share_1"] for line in history if "eval_loss" in line],
    "depths": depths, "recursions": mor_config.num_recursions,
    "swapped_depths": swapped_depths, "difference": difference,
    "costs": [cost(mor_config) / cost(dense_config) for cost in costs.values()],
    "parameters": [dense.num_parameters(), converted.num_parameters(), swapped.num_parameters()],
    "perplexities": [*perplexities.values(), *swapped_perplexities],
}))
"""


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # no version of a machine
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebook_lead_somewhere(path):
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(texts))
    assert links
    for target in links:
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The first notebook after a run of seconds, in an empty folder, and its report."""
    notebook = read(FIRST)
    (budget,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert re.match(r"BUDGET = 1\.0\b", budget.source)
    budget.source = "import torch\ntorch.set_num_threads(1)\nBUDGET = 0.03"
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    folder = tmp_path_factory.mktemp("notebook")
    # A kernel named python3 without a specification of its own is this interpreter's.
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    (report,) = notebook.cells.pop().outputs
    return notebook, json.loads(report.text), folder


def outputs(notebook, cell_id):
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return cell.outputs


def test_models_of_the_notebook_learn(executed):
    _, report, _ = executed
    for losses in (*report["losses"], report["dense_losses"]):
        assert losses[0] > losses[-1] + 0.2
        assert losses[0] < math.log(2048) + 0.5
    _, converted, up_trained, swapped, trained = report["perplexities"]
    assert up_trained < converted
    assert trained < swapped


def test_depths_of_the_notebook_are_recursions(executed):
    _, report, _ = executed
    assert report["depths"]
    assert set(report["depths"]) <= set(range(1, report["recursions"] + 1))
    assert set(report["swapped_depths"]) <= {1, 2}
    assert set(report["shares"]) == {1}  # the first recursion takes every token


def test_swapped_model_of_the_notebook_loads_with_the_same_logits(executed):
    _, report, folder = executed
    assert report["difference"] == 0
    for name in ("swapped", "mor"):
        assert (folder / "runs" / "first_mor" / name / "model" / "model.safetensors").exists()


def test_recursive_models_of_the_notebook_cost_less(executed):
    _, report, _ = executed
    assert all(0.3 < ratio < 0.9 for ratio in report["costs"])
    dense, converted, swapped = report["parameters"]
    assert converted < swapped < dense


def test_notebook_shows_figures_and_the_coloured_text(executed):
    notebook, _, _ = executed
    for cell_id in ("plot", "router-scores"):
        assert any("image/png" in output.get("data", {}) for output in outputs(notebook, cell_id))
    (page,) = (output.data["text/html"] for output in outputs(notebook, "depths"))
    assert page.count("&lt;span class=&quot;t d") > 100
    assert COLOURS[1][0] in page


def test_notebook_prints_no_warnings_and_no_machine_paths(executed):
    notebook, _, folder = executed
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                # tqdm asks for ipywidgets, which the notebook names and the tests do without.
                if output.name == "stderr":
                    assert "IProgress not found" in output.text, output.text
                else:
                    assert str(folder) not in output.text
                    assert str(ROOT) not in output.text
