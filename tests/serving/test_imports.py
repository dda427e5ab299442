"""What is imported when: serving is an extra."""

import subprocess
import sys

#: Modules that are not imported after each statement, in this order in one process.
ABSENT = {
    "import mor": ["mor.serving", "fastapi", "uvicorn", "llguidance", "prometheus_client"],
    "import mor.serving": ["mor.serving.protocol", "fastapi", "llguidance"],
    "import mor.serving.continuation, mor.serving.grammar": [
        "mor.serving.protocol",
        "fastapi",
        "llguidance",
    ],
}


def test_serving_is_imported_by_who_asks():
    lines = ["import sys"]
    for statement, absent in ABSENT.items():
        lines += [statement, f"print([name for name in {absent!r} if name in sys.modules])"]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["[]"] * 3
