"""Builds the sdist, a wheel from it, and tries the wheel in two empty environments.

    .venv/bin/python tools/wheel_check.py build/wheel-check

Each new environment sees only the packages that the wheel says it needs, linked from this one: of
`mor` (operators, a model) in one, of `mor[train]` (a short run) in the other. mor comes from the
wheel, and its commands run from another folder.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from venv import EnvBuilder

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BUILD_SDIST = """
import sys
sys.path.insert(0, '_build')
import backend
backend.build_sdist(sys.argv[1])
"""
SHORT_RUN = (
    "train --steps 2 --layers 5 --hidden-size 32 --heads 2 --vocab-size 300 --seq-len 16 "
    "--max-tokens 3000 --eval-every 0 --no-progress"
)
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

    with tempfile.TemporaryDirectory() as elsewhere:
        bare = environment(folder / "bare", wheel)
        print(run(bare / "mor", "info", cwd=elsewhere))
        example = ROOT / "tools" / "run_examples.py"
        print(run(bare / "python", example, ROOT / "README.md", cwd=elsewhere))
        run("sh", "-c", f"! {bare}/mor train 2> said && grep -F 'mor[train]' said", cwd=elsewhere)
        train = environment(folder / "train", wheel, "train")
        print(run(train / "mor", *SHORT_RUN.split(), cwd=elsewhere))
    print(f"{sdist.name} and {wheel.name} work")


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """Installs a wheel, links what it needs from this environment, returns its commands."""
    EnvBuilder(clear=True).create(folder)
    commands = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--python", commands / "python")
    run(*pip, "install", "--no-deps", wheel)
    packages = Path(run(commands / "python", "-c", SITE_PACKAGES).strip())
    installed: Distribution = PathDistribution(next(packages.glob("mor-*.dist-info")))
    waiting, linked = [(installed, extra)], set()
    while waiting:
        package, of = waiting.pop()
        for needed in map(Requirement, package.requires or []):
            if needed.marker is not None and not needed.marker.evaluate({"extra": of}):
                continue
            if needed.name in linked:
                continue
            linked.add(needed.name)
            found = distribution(needed.name)
            waiting.append((found, ""))
            for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                if not (packages / name).exists():
                    (packages / name).symlink_to(found.locate_file(name))
    where = run(commands / "python", "-c", "import mor; print(mor.__file__)", cwd=folder).strip()
    if not Path(where).is_relative_to(packages):
        sys.exit(f"wheel-check: mor came from {where}, not from the wheel")
    return commands


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
