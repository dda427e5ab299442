"""The build backend: what it says when something is missing, and what it leaves alone."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scikit_build_core")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("MOR_TORCH_DIR", raising=False)
    spec = importlib.util.spec_from_file_location("mor_backend", ROOT / "_build" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_installed_torch_is_found_and_not_required_again(backend):
    assert backend._checked_torch_dir() == Path(torch.__file__).parent
    assert not any("torch" in r for r in backend.get_requires_for_build_wheel())
    settings = backend._with_torch({"cmake.args": "-G Ninja"})
    assert settings["cmake.define.MOR_TORCH_DIR"] == str(Path(torch.__file__).parent)
    assert settings["cmake.args"] == "-G Ninja"


def test_missing_torch_is_required_and_named(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "torch>=2.11" in backend.get_requires_for_build_wheel()
    with pytest.raises(SystemExit, match=r"mor: no PyTorch found; install torch>=2.11 first"):
        backend._with_torch(None)


def test_a_torch_dir_without_torch_is_named(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("MOR_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=f"mor: no PyTorch found in {tmp_path}"):
        backend._with_torch(None)


def test_too_old_torch_is_named(backend, monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setenv("MOR_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"mor: needs torch 2.11 or newer, found 2\.9"):
        backend._with_torch(None)


def test_missing_compiler_is_named(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"mor: no C\+\+ compiler found; install g\+\+"):
        backend._with_torch(None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="set CXX"):
        backend._with_torch(None)


def test_cuda_can_be_chosen_from_the_environment(backend, monkeypatch):
    monkeypatch.setenv("MOR_CUDA", "OFF")
    assert backend._with_torch(None)["cmake.define.MOR_CUDA"] == "OFF"
