"""PEP 517 backend: scikit-build-core, plus the folder of the torch that is already installed.

pip's isolated build environment hides site-packages from sys.path, but it still runs the user's
interpreter, so sysconfig names the user's site-packages. Torch is found there by path and never
imported; it becomes a build requirement only where none is installed.
"""

import importlib.machinery
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_OLDEST_TORCH = (2, 11)


def _torch_dir():
    override = os.environ.get("MOR_TORCH_DIR")
    if override:
        return Path(override)
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    spec = importlib.machinery.PathFinder.find_spec("torch", paths)
    return Path(spec.origin).parent if spec and spec.origin else None


def _checked_torch_dir():
    torch_dir = _torch_dir()
    if torch_dir is None or not (torch_dir / "version.py").exists():
        where = f" in {torch_dir}" if torch_dir else ""
        raise SystemExit(
            f"mor: no PyTorch found{where}; install torch>=2.11 first (any build), or set "
            "MOR_TORCH_DIR."
        )
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch_dir / "version.py").read_text())
    if match and (int(match[1]), int(match[2])) < _OLDEST_TORCH:
        raise SystemExit(
            f"mor: needs torch 2.11 or newer, found {match[1]}.{match[2]} in {torch_dir}."
        )
    return torch_dir


def _check_compiler():
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise SystemExit(
            "mor: no C++ compiler found; install g++ (12 or newer) or clang++, or set CXX."
        )


def _with_torch(config_settings):
    torch_dir = _checked_torch_dir()
    _check_compiler()
    settings = {**(config_settings or {}), "cmake.define.MOR_TORCH_DIR": str(torch_dir)}
    if "MOR_CUDA" in os.environ:
        settings["cmake.define.MOR_CUDA"] = os.environ["MOR_CUDA"]
    return settings


def get_requires_for_build_wheel(config_settings=None):
    requires = list(_build.get_requires_for_build_wheel(config_settings))
    return requires if _torch_dir() else [*requires, "torch>=2.11"]


def get_requires_for_build_editable(config_settings=None):
    requires = list(_build.get_requires_for_build_editable(config_settings))
    return requires if _torch_dir() else [*requires, "torch>=2.11"]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _build.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _build.build_editable(wheel_directory, _with_torch(config_settings), metadata_directory)
