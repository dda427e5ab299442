"""Builds the sdist, the wheel from it, and uses the wheel as a stranger would.

    .venv/bin/python tools/check_wheel.py

The wheel goes into a new virtual environment with nothing but torch; there, in another folder, the
README's example and `mor info` must run.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from venv import EnvBuilder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))
sys.path.insert(0, str(ROOT / "tools"))

import backend  # noqa: E402
from bootstrap import install_torch, pinned  # noqa: E402


def run(*command: object, cwd: Path = ROOT) -> str:
    """Runs a command; a failure shows what it printed."""
    # Neither the checkout nor the calling environment may be what makes the example run.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    arguments = [str(c) for c in command]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Builds, installs, runs."""
    dist = ROOT / "dist"
    sdist = dist / backend.build_sdist(str(dist))
    print(f"sdist {sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
            "-w", wheels, sdist)  # fmt: skip
        wheel = next(wheels.glob("*.whl"))
        print(f"wheel {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        EnvBuilder(with_pip=True).create(Path(folder) / "venv")
        python = Path(folder) / "venv" / "bin" / "python"
        requirements = ROOT / "requirements.txt"
        install_torch(python, pinned(requirements, "torch"))
        before = run(python, "-c", "import torch; print(torch.__version__)", cwd=Path(folder))
        run(python, "-m", "pip", "install", "-c", requirements, wheel)
        after = run(python, "-c", "import torch; print(torch.__version__)", cwd=Path(folder))
        assert before == after, f"installing mor replaced torch {before} by {after}"
        readme = (ROOT / "README.md").read_text()
        example = re.search(r"^```python\n(.*?)^```", readme, re.M | re.S)
        assert example is not None, "README.md has no Python example"
        (Path(folder) / "example.py").write_text(example[1])
        print(run(python, "example.py", cwd=Path(folder)), end="")
        print(run(python, "-m", "mor", "info", cwd=Path(folder)), end="")
    print("wheel: ok")


if __name__ == "__main__":
    main()
