"""Builds the sdist, a wheel from it, and tries the wheel in an empty environment.

    .venv/bin/python tools/wheel_check.py build/wheel-check

The new environment sees the packages of the one that runs this (torch, Transformers), but not its
mor: that comes from the wheel. It runs `mor info` and the README's example, from another folder.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from venv import EnvBuilder

ROOT = Path(__file__).resolve().parent.parent
BUILD_SDIST = """
import sys
sys.path.insert(0, '_build')
import backend
backend.build_sdist(sys.argv[1])
"""
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"


def main(folder: Path) -> None:
    """Builds, installs, runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]:
        old.unlink()
    pip = (sys.executable, "-m", "pip")
    run(sys.executable, "-c", BUILD_SDIST, folder)
    (sdist,) = folder.glob("*.tar.gz")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("*.whl")

    venv = folder / "venv"
    EnvBuilder(clear=True).create(venv)
    python = venv / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel)
    packages = Path(run(python, "-c", SITE_PACKAGES).strip())
    # A folder named in a .pth file is searched; .pth files in it (an editable mor) are not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory() as elsewhere:
        where = run(python, "-c", "import mor; print(mor.__file__)", cwd=elsewhere).strip()
        if not Path(where).is_relative_to(packages):
            sys.exit(f"wheel-check: mor came from {where}, not from the wheel")
        print(run(venv / "bin" / "mor", "info", cwd=elsewhere))
        example = ROOT / "tools" / "run_examples.py"
        print(run(python, example, ROOT / "README.md", cwd=elsewhere))
    print(f"{sdist.name} and {wheel.name} work")


def run(*command: str | Path, cwd: str | Path = ROOT) -> str:
    """Runs a command and returns what it prints; its failure ends the check."""
    # This environment's ninja; and no path that could lend the sources to the test.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"wheel-check: failed: {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
