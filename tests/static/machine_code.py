"""Reads what ptxas made of the kernels in a shared library: registers, shared memory, spills,
instructions; and how many blocks of a kernel that lets run at once.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BUDGETS: list[dict[str, Any]] = json.loads((REPOSITORY / "kernels/budgets.json").read_text())[
    "kernels"
]
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that CUDA takes of every block


@dataclass
class Kernel:
    """One kernel of one architecture."""

    architecture: str
    name: str  # with template arguments
    registers: int
    stack: int  # bytes: spills, or arrays that found no registers
    shared: int  # bytes, static
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def budget(self) -> dict[str, Any] | None:
        """The first that fits."""
        return next((b for b in BUDGETS if fnmatchcase(self.name, b["kernel"])), None)

    @property
    def layout(self) -> str | None:
        """The type in its dynamic shared memory."""
        arguments = self.name.partition("<")[2].removesuffix(">")
        layout = (self.budget or {}).get("layout")
        return layout and layout.replace("*", arguments)

    @property
    def spills(self) -> bool:
        """Whether it uses local memory beyond the stack that its budget names."""
        allowed = (self.budget or {}).get("stack", 0)
        moves = self.instructions["STL"] or self.instructions["LDL"]
        return self.stack > allowed or bool(moves and not allowed)


def resident_blocks(budget: dict[str, Any], architecture: str) -> int:
    """How many blocks that use all of their budget run on a multiprocessor at once."""
    threads = budget["threads"]
    # Each of four schedulers has 16384 registers, given to a warp in units of 256.
    warps = 4 * (16384 // (-(-budget["registers"] // 8) * 256))
    shared = -(-(budget["shared"] + RESERVED) // 128) * 128
    return min(
        warps // -(-threads // 32), SHARED_KIB[architecture] * 1024 // shared, 2048 // threads, 32
    )


def cuobjdump() -> Path | None:
    """The tool of the package nvidia-cuda-cuobjdump, if installed."""
    found = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu1*/bin/cuobjdump")
    return next(found, None)


def _run(tool: Path, *arguments: str) -> str:
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}  # nvdisasm lies beside it
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment)
    if "does not contain device code" in done.stdout + done.stderr:
        return ""
    done.check_returncode()
    return done.stdout


def _short_names(symbols: list[str]) -> dict[str, str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True
    ).stdout
    names = [line.split("(")[0].removeprefix("void ") for line in text.splitlines()]
    return {s: n.replace("mor::", "") for s, n in zip(symbols, names, strict=True)}


@cache
def kernels(library: Path) -> list[Kernel]:
    """Our kernels (not CUB's) of all architectures in the library; none if it has no CUDA code."""
    tool = cuobjdump()
    assert tool is not None
    found: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""
    for line in _run(tool, "--dump-resource-usage", str(library)).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif symbol.startswith("_ZN3mor") and (
            match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)
        ):
            registers, stack, shared = map(int, match.groups())
            if architecture != "sm_80":  # counts what is reserved, if any kernel uses some
                shared = max(shared - RESERVED, 0)
            found[architecture, symbol] = Kernel(architecture, symbol, registers, stack, shared)
    for architecture in {a for a, _ in found}:
        current = None
        for line in _run(tool, "-sass", "-arch", architecture, str(library)).splitlines():
            if match := re.search(r"Function : (\S+)", line):
                current = found.get((architecture, match[1]))
            elif current is not None and (
                match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", line)
            ):
                current.instructions.update(_classes(match[1]))
    names = _short_names([symbol for _, symbol in found])
    for (_, symbol), kernel in found.items():
        kernel.name = names[symbol]
    return list(found.values())


def sizes_of(types: set[str], folder: Path) -> dict[str, int]:
    """Bytes of types of kernels/**/*.cuh, as nvcc lays them out."""
    headers = sorted((REPOSITORY / "kernels").rglob("*.cuh"))
    program = [*(f'#include "{header}"' for header in headers), "#include <cstdio>"]
    program += ["using namespace mor;", "int main() {"]
    program += [f'std::printf("%zu\\t%s\\n", sizeof({t}), "{t}");' for t in sorted(types)]
    (folder / "sizes.cu").write_text("\n".join([*program, "}\n"]))
    command = ["nvcc", "-std=c++20", "-arch=compute_80", "sizes.cu", "-o", "sizes"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    lines = subprocess.check_output([folder / "sizes"], text=True).splitlines()
    return {name: int(size) for size, name in (line.split("\t") for line in lines)}


def _classes(instruction: str) -> list[str]:
    """LDG.E.128.CONSTANT counts as LDG, and as LDG.128."""
    base, *modifiers = instruction.split(".")
    return [base, f"{base}.128"] if "128" in modifiers else [base]
