"""Notebooks read and executed, for the tests of what they show."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat

from tools.run_notebooks import execute

FOLDER = Path(__file__).parents[2] / "notebooks"


def read(path: Path) -> Any:
    """The notebook as committed."""
    return nbformat.read(path, as_version=4)


def executed(path: Path, folder: Path, report: str, budget: float | None = None) -> tuple[Any, Any]:
    """The notebook after a run in a folder, and what the reader has seen.

    Args:
        path: the notebook.
        folder: an empty one.
        report: an expression, evaluated in the notebook's own process after its last cell, whose
            value JSON can hold.
        budget: in place of the 1.0 of the cell with the tag `parameters`, so that it takes seconds.
    """
    notebook = read(path)
    if budget is not None:
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
        cell.source, count = re.subn(r"\ABUDGET = 1\.0\b", f"BUDGET = {budget}", cell.source)
        assert count == 1
    code = f"import json\nprint(json.dumps({report}))"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    execute(notebook, folder, OMP_NUM_THREADS="1")
    (output,) = notebook.cells.pop().outputs
    return notebook, json.loads(output.text)


def outputs(notebook: Any, cell_id: str) -> Any:
    """Outputs of one cell."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return cell.outputs
