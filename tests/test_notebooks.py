"""The notebooks: clean as committed, and the first one shows what it promises when it is run."""

import math
import re

import nbformat
import pytest

from mor.analysis.depth_page import COLOURS
from tests.support.notebooks import FOLDER, executed, outputs, read
from tools.run_notebooks import problems

pytestmark = pytest.mark.xdist_group("notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# What the reader has seen.
REPORT = """{
    "losses": [column("lm_loss")[1], column("eval_loss")[1]],
    "dense_losses": [line["loss"] for line in dense_history if "loss" in line],
    "shares": [line["eval_selected_share_1"] for line in history if "eval_loss" in line],
    "depths": depths, "recursions": mor_config.num_recursions,
    "swapped_depths": swapped_depths, "difference": difference,
    "costs": [cost(mor_config) / cost(dense_config) for cost in costs.values()],
    "parameters": [dense.num_parameters(), converted.num_parameters(), swapped.num_parameters()],
    "perplexities": [*perplexities.values(), *swapped_perplexities],
}"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_nothing_else(path):
    """Executed in order, without errors, warnings, progress bars or paths of a machine."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert problems(notebook) == []


def test_problems_are_found():
    notebook = read(FOLDER / "operators.ipynb")
    cell = next(cell for cell in notebook.cells if cell.get("outputs"))
    cell.execution_count = 99
    cell.metadata["collapsed"] = True
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="UserWarning: old"))
    cell.outputs.append(nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[]))
    cell.outputs.append(nbformat.v4.new_output("stream", text="saved to /home/someone/model"))
    page = {"text/html": "<div><progress value='3'></progress></div>"}
    cell.outputs.append(nbformat.v4.new_output("display_data", data=page))
    notebook.metadata.language_info["version"] = "3.11.9"
    found = "\n".join(problems(notebook))
    for word in ("in order", "editor", "UserWarning", "KeyError", "/home/", "progress", "version"):
        assert word in found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebook_lead_somewhere(path):
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(texts))
    assert links
    for target in links:
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first notebook after a run of seconds, its report, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    return *executed(FOLDER / "first_mor.ipynb", folder, REPORT, budget=0.03), folder


@pytest.mark.notebook
def test_models_of_the_notebook_learn(first):
    _, report, _ = first
    for losses in (*report["losses"], report["dense_losses"]):
        assert losses[0] > losses[-1] + 0.2
        assert losses[0] < math.log(2048) + 0.5
    _, converted, up_trained, swapped, trained = report["perplexities"]
    assert up_trained < converted
    assert trained < swapped


@pytest.mark.notebook
def test_depths_of_the_notebook_are_recursions(first):
    _, report, _ = first
    assert report["depths"]
    assert set(report["depths"]) <= set(range(1, report["recursions"] + 1))
    assert set(report["swapped_depths"]) <= {1, 2}
    assert set(report["shares"]) == {1}  # the first recursion takes every token


@pytest.mark.notebook
def test_swapped_model_of_the_notebook_loads_with_the_same_logits(first):
    _, report, folder = first
    assert report["difference"] == 0
    for name in ("swapped", "mor"):
        assert (folder / "runs" / "first_mor" / name / "model" / "model.safetensors").exists()


@pytest.mark.notebook
def test_recursive_models_of_the_notebook_cost_less(first):
    _, report, _ = first
    assert all(0.3 < ratio < 0.9 for ratio in report["costs"])
    dense, converted, swapped = report["parameters"]
    assert converted < swapped < dense


@pytest.mark.notebook
def test_notebook_shows_figures_and_the_coloured_text(first):
    notebook, _, _ = first
    for cell_id in ("plot", "router-scores"):
        assert any("image/png" in output.get("data", {}) for output in outputs(notebook, cell_id))
    (page,) = (output.data["text/html"] for output in outputs(notebook, "depths"))
    assert page.count("&lt;span class=&quot;t d") > 100
    assert COLOURS[1][0] in page


@pytest.mark.notebook
def test_notebook_prints_no_warnings_and_no_machine_paths(first):
    notebook, _, folder = first
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", output.text
            assert str(folder) not in output.get("text", "")
