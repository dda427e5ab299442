"""Every module path of earlier versions goes on working."""

import importlib
import subprocess
import sys

import pytest

import mor

#: Modules that stood at the top of mor, and one public name of each.
OLD = {
    "analysis": "flops_per_token",
    "callbacks": "LogRouting",
    "checkpoints": "checkpoint_to_resume",
    "cli": "app",
    "convert": "convert_checkpoint",
    "corpus": "open_corpus",
    "data": "TokenBlocks",
    "demo": "run_demo",
    "depth_page": "depth_page",
    "distributed": "shard",
    "generate": "load_model",
    "look": "look_at",
    "optim": "parameter_groups",
    "options": "RunOptions",
    "run": "prepare_run",
    "text_files": "read_text",
    "training": "MoRTrainer",
    "trl": "RouterLossMixin",
    "viz": "plot_text_by_depth",
}


@pytest.mark.parametrize("old", OLD)
def test_old_path_is_the_module_at_the_new_one(old):
    module = importlib.import_module(f"mor.{old}")
    kept = getattr(module, OLD[old])
    assert getattr(importlib.import_module(kept.__module__), OLD[old], kept) is kept
    assert getattr(mor, old) is module
    new = importlib.import_module(module.__name__)
    assert new is module
    assert importlib.util.find_spec(module.__name__).name == module.__spec__.name


def test_old_paths_in_a_fresh_process():
    lines = [f"from mor.{old} import {name}" for old, name in OLD.items()]
    code = "\n".join(
        [*lines, "import mor.viz as viz, mor.analysis.plots as plots", "print(viz is plots)"]
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["True"], result.stderr


def test_a_path_that_never_was_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mor\.nothing'"):
        importlib.import_module("mor.nothing")
