"""tools/bootstrap.py: what is missing on a machine is one clear sentence."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bootstrap():
    specification = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools/bootstrap.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with only what a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def add(name: str, output: str = "") -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{output}'\n")
        path.chmod(0o755)

    return add


def test_old_python(bootstrap, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"mor: needs Python 3\.11 or newer, found 3\.10\.4"):
        bootstrap.check_python()


def test_missing_compiler(bootstrap, tools):
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found; install g\+\+"):
        bootstrap.check_build_tools()


def test_named_compiler_that_is_not_there(bootstrap, tools, monkeypatch):
    tools("g++")
    monkeypatch.setenv("CXX", "nowhere/g++")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found"):
        bootstrap.check_build_tools()


def test_missing_and_old_cmake(bootstrap, tools):
    tools("g++")
    with pytest.raises(SystemExit, match=r"no CMake found; install cmake 3\.25"):
        bootstrap.check_build_tools()
    tools("cmake", "cmake version 3.18.4")
    with pytest.raises(SystemExit, match=r"needs CMake 3\.25 or newer, found 3\.18"):
        bootstrap.check_build_tools()
    tools("cmake", "cmake version 4.1.0")
    bootstrap.check_build_tools()


def test_python_without_venv_names_the_package(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # as on Debian without python3-venv
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        bootstrap.create(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_environment_without_pip_is_made_again(bootstrap, tmp_path):
    assert not bootstrap.has_pip(tmp_path / "bin" / "python")
    assert bootstrap.has_pip(Path(sys.executable))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    assert not bootstrap.has_pip(tmp_path / "v" / "bin" / "python")


@pytest.mark.parametrize(
    ("driver", "own_index", "reachable", "expected"),
    [
        (False, False, True, ["cpu"]),
        (False, False, False, ["cpu", "default"]),
        (False, True, True, ["default"]),
        (True, False, True, ["default"]),
    ],
    ids=["no driver", "no driver, CPU index unreachable", "own index", "driver"],
)
def test_build_of_torch(bootstrap, monkeypatch, driver, own_index, reachable, expected):
    calls = []

    def pip(python, *arguments, check=True):
        calls.append("cpu" if bootstrap.CPU_INDEX in arguments else "default")
        assert arguments[-1] == "torch==2.13.0"
        return 0 if reachable or calls[-1] == "default" else 1

    monkeypatch.setattr(bootstrap, "pip", pip)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(bootstrap, "has_own_index", lambda python: own_index)
    requirement = bootstrap.pinned(ROOT / "requirements.txt", "torch")
    bootstrap.install_torch(Path("python"), requirement)
    assert calls == expected


def test_own_index_is_read_from_pip(bootstrap, monkeypatch):
    def settings(text):
        answer = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(bootstrap, "answer", lambda *arguments: answer)
        return bootstrap.has_own_index(Path("python"))

    assert settings("global.index-url='https://mirror'\n")
    assert settings(":env:.find-links='/wheels'\n")
    assert not settings("global.timeout='60'\n")
    assert not settings("")
