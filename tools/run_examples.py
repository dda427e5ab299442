"""Runs the Python examples of Markdown files: every ```python block, one namespace a file.

python tools/run_examples.py README.md docs/*.md

A block with prompts (>>>) is checked like a doctest.
"""

import doctest
import re
import sys
from pathlib import Path


def main(paths: list[str]) -> None:
    """Runs all, then fails if any failed."""
    failed = 0
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        names: dict[str, object] = {}
        blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
        for block in blocks:
            line = text.count("\n", 0, block.start(1))
            failed += not run(block[1], f"{path}:{line + 1}", names)
        print(f"{path}: {len(blocks)} examples")
    if failed:
        sys.exit(f"{failed} examples failed")


def run(code: str, where: str, names: dict[str, object]) -> bool:
    """Runs one block; returns whether it did what it shows."""
    if ">>> " in code:
        test = doctest.DocTestParser().get_doctest(code, names, where, where, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        result = runner.run(test, clear_globs=False)
        names.update(test.globs)
        return result.failed == 0
    try:
        exec(compile(code, where, "exec"), names)
    except Exception as error:
        print(f"{where}: {type(error).__name__}: {error}")
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
