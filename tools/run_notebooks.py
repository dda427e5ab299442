"""Executes the notebooks and writes them with their outputs, clean: `make notebooks`.

python tools/run_notebooks.py                               # all of notebooks/
python tools/run_notebooks.py notebooks/operators.ipynb     # one

Each runs in an empty folder, in a kernel of this interpreter. What a notebook shows is written back
only if it may be committed: no error, no warning, no path of the machine. `problems` is that rule,
and the tests apply it to what is committed.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
#: A figure of a screen's resolution has a tenth of this.
LARGEST_BYTES = 400_000
#: Folders that tell whose machine it was.
_PATHS = re.compile(
    "|".join(
        [
            "/home/",
            "/root/",
            "/Users/",
            "/tmp/",
            "site-packages",
            *map(re.escape, (str(ROOT), sys.prefix)),
        ]
    )
)
_PROGRESS = re.compile(r"<progress\b")


def execute(notebook: Any, folder: Path, **environment: str) -> None:
    """Runs a notebook in a folder; its outputs are those of this run.

    Args:
        notebook: changed in place.
        folder: where it runs.
        **environment: variables of the kernel, beside those of this process.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    # tqdm asks for ipywidgets, which the reader has and a test does without.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
    resources = {"metadata": {"path": str(folder)}}
    # A kernel named python3 without a specification of its own is this interpreter's.
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    ).execute(env={**os.environ, **quiet, **environment})


def clean(notebook: Any) -> None:
    """Takes off what says more of a run than of its result, and makes figures small."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _with_few_colours(output.data["image/png"])


def _with_few_colours(png: str) -> str:
    """A figure, base64 as in a notebook, with at most 128 colours: a third of the bytes."""
    from PIL import Image  # matplotlib needs it, too

    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _is_progress(output: Any) -> bool:
    return bool(_PROGRESS.search(output.get("data", {}).get("text/html", "")))


def problems(notebook: Any) -> list[str]:
    """Reasons why a notebook must not be committed as it is; none is good."""
    found = []
    if set(notebook.metadata) != {"kernelspec", "language_info"}:
        found.append(f"metadata beside kernelspec and language_info: {sorted(notebook.metadata)}")
    if notebook.metadata.get("language_info") != {"name": "python"}:
        found.append("language_info: expected the name alone, got the version of a machine")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"cells were not executed once, in order: {counts}")
    for cell in notebook.cells:
        if not set(cell.metadata) <= {"tags"}:
            found.append(f"{cell.id}: metadata of an editor: {sorted(cell.metadata)}")
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                found.append(f"{cell.id}: ends in {output.ename}")
            elif output.get("name") == "stderr" or "WARNING" in output.get("text", ""):
                found.append(f"{cell.id}: a warning: {output.text.strip()[:200]}")
            elif _is_progress(output):
                found.append(f"{cell.id}: a progress bar")
            for text in _texts(output):
                if path := _PATHS.search(text):
                    found.append(f"{cell.id}: a path of the machine: {text[path.start() :][:60]!r}")
    if not any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs):
        found.append("no figure")
    if (size := len(nbformat.writes(notebook).encode())) > LARGEST_BYTES:
        found.append(f"{size:,} bytes, more than {LARGEST_BYTES:,}: make figures smaller")
    return found


def _texts(output: Any) -> list[str]:
    texts = [output.get("text", ""), *output.get("traceback", ())]
    return texts + [
        text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
    ]


def main(arguments: list[str]) -> None:
    """Executes all that are named, then fails if any may not be committed."""
    paths = [Path(name) for name in arguments] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    failed = []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        clean(notebook)
        found = problems(notebook)
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s", flush=True)
        if found:
            failed.append(path.name)
            print("\n".join(f"  {problem}" for problem in found), flush=True)
        else:
            nbformat.write(notebook, path)
    if failed:
        sys.exit(f"not written: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
