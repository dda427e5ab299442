"""The machine that a figure was measured on, and the folder of its results."""

import platform
import re
import shutil
import subprocess
from typing import Any

import torch

import mor.ops  # noqa: F401  (registers instruction_set)

__all__ = ["folder_name", "machine"]


def machine() -> dict[str, Any]:
    """What a figure needs beside it."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    found = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_set": torch.ops.mor.instruction_set(""),
        "commit": commit,
    }
    if torch.get_default_device().type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def folder_name(found: dict[str, Any]) -> str:
    """The folder of a machine's results; figures that cannot be compared get another folder."""
    if "gpu" in found:
        words = found["gpu"]
    else:
        cpu = re.sub(r"\((R|TM)\)|Processor|CPU|@.*", " ", found["cpu"]).strip()
        threads = f"{found['threads']}thread" + "s" * (found["threads"] > 1)
        words = f"{cpu} {found['instruction_set']} {threads} {found.get('clock', '')}"
    return re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")
