"""Makes the virtual environment that the Makefile works in; needs nothing but Python.

    python3 tools/bootstrap.py .venv

Creates the environment if it is not there, installs the pinned requirements, and checks that what
the build needs is there. Everything that can be missing is one clear sentence.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
OLDEST_CMAKE = (3, 25)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Checks, creates, installs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    venv = parser.parse_args().venv
    check_python()
    check_build_tools()
    python = venv / "bin" / "python"
    if not has_pip(python):
        create(venv)
    requirements = ROOT / "requirements.txt"
    install_torch(python, pinned(requirements, "torch"))
    pip(python, "install", "-r", str(requirements))


def check_python() -> None:
    """The pinned packages have a lower limit."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        have = ".".join(map(str, sys.version_info[:3]))
        stop(f"needs Python {wanted} or newer, found {have}; try make PYTHON=python{wanted}")


def check_build_tools() -> None:
    """A missing compiler should be known before gigabytes are installed."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        stop("no C++ compiler found; install g++ (12 or newer) or clang++, or set CXX")
    wanted = ".".join(map(str, OLDEST_CMAKE))
    if shutil.which("cmake") is None:
        stop(f"no CMake found; install cmake {wanted} or newer")
    text = subprocess.run(
        ["cmake", "--version"], capture_output=True, text=True, check=False
    ).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    if match and (int(match[1]), int(match[2])) < OLDEST_CMAKE:
        stop(f"needs CMake {wanted} or newer, found {match[0]}")


def has_pip(python: Path) -> bool:
    """Whether the environment is there and whole (a killed creation leaves one without pip)."""
    return python.exists() and answer(python, "--version").returncode == 0


def create(venv: Path) -> None:
    """A new environment; Debian splits the modules this needs into a package of their own."""
    print(f"Creating {venv}", flush=True)
    try:
        import ensurepip  # noqa: F401
        from venv import EnvBuilder
    except ImportError:
        stop(
            f"this Python ({sys.executable}) cannot make virtual environments; install its venv "
            f"package (Debian, Ubuntu: apt install python3.{sys.version_info[1]}-venv), or name "
            "another: make PYTHON=/path/to/python3"
        )
    try:
        EnvBuilder(with_pip=True, clear=True).create(venv)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(venv, ignore_errors=True)
        stop(f"cannot create {venv}: {error}")


def install_torch(python: Path, requirement: str) -> None:
    """Installs torch, the CPU build where there is no NVIDIA driver (a tenth of the size).

    A pip that was configured with indexes of its own is left to choose.
    """
    if not has_nvidia_driver() and not has_own_index(python):
        only_cpu = ["--index-url", CPU_INDEX, "--retries", "1", "--timeout", "15"]
        if pip(python, "install", *only_cpu, requirement, check=False) == 0:
            return
        print(f"{CPU_INDEX} is not reachable; taking torch from the default index", flush=True)
    pip(python, "install", requirement)


def has_nvidia_driver() -> bool:
    """Whether CUDA could be used here."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def has_own_index(python: Path) -> bool:
    """Whether pip's configuration or environment names where packages come from."""
    settings = answer(python, "config", "list").stdout
    pattern = r"(^|\.)(index-url|extra-index-url|find-links|no-index)="
    return re.search(pattern, settings, re.M) is not None


def pinned(requirements: Path, name: str) -> str:
    """The line of a requirements file for one package."""
    match = re.search(rf"^{name}==.*$", requirements.read_text(), re.M)
    if match is None:
        stop(f"{requirements} pins no {name}")
    return match[0]


def answer(python: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the environment's pip quietly, for what it says."""
    command = [str(python), "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def pip(python: Path, *arguments: str, check: bool = True) -> int:
    """Runs the environment's pip with its own progress."""
    status = subprocess.run([str(python), "-m", "pip", *arguments], check=False).returncode
    if check and status != 0:
        stop(f"pip {arguments[0]} failed (see above); make goes on from here when run again")
    return status


def stop(message: str) -> NoReturn:
    """Ends with one sentence."""
    sys.exit(f"mor: {message}")


if __name__ == "__main__":
    main()
