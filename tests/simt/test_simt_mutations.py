"""The tests of tests/ops find seeded bugs of the CUDA operators: a survivor is a missing test.

`make mutation-test` runs every one of mutations/; `make test` two. Only the changed operator is
compiled, with its copy of kernels/, and only for one dtype where the mutation names it.
"""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import BUILD_FOLDER, ROOT, SELECTED, build, compiler, environment
from mutations import Mutation, all_mutations

KERNELS = ROOT / "kernels"
TIMEOUT = 300  # seconds, for tests that take one
# Its processes begin with torch imported, which takes longer than the tests.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "hypothesis"])
ELEMENTS = {
    "float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half", "float64": "double"
}  # fmt: skip
NOT_COMPILED = "a dtype that the mutation leaves out"
# Among them an integer division by zero, which x86 traps every time, whatever lies in memory. A
# segmentation fault is not: where a stray address leads is chance, and bounds are the asan build's.
FOUND = re.compile(
    r"^E +(assert |AssertionError|Failed|RuntimeError: |.*(race on|never written|barrier|deadlock))"
    r"|AddressSanitizer|runtime error: |Floating point exception",
    re.MULTILINE,
)
MUTATIONS = [
    pytest.param(
        n, m, id=f"{n}-{m.id}",
        marks=[pytest.mark.slow] * (not m.sample) + [pytest.mark.clang] * (m.build == "asan"),
    )
    for n, m in all_mutations()
]  # fmt: skip
UNCHANGED = {n: m for n, m in all_mutations() if m.build != "asan"}


def compile_mutant(operator: str, mutation: Mutation, folder: Path) -> Path:
    """The build with this operator compiled anew from a changed copy of kernels/."""
    build(mutation.build)  # its other objects serve again
    shutil.copytree(KERNELS, folder / "kernels")
    (folder / "csrc").symlink_to(ROOT / "csrc")
    changed = folder / "kernels" / mutation.file
    changed.write_text(changed.read_text().replace(mutation.old, mutation.new))
    if mutation.dtype is not None:
        others = "|".join(e for d, e in ELEMENTS.items() if d != mutation.dtype)
        glue = folder / "kernels/glue.h"
        lacks = f'throw std::runtime_error("{NOT_COMPILED}")'
        glue.write_text(re.sub(rf"return body\(({others})\{{\}}\)", lacks, glue.read_text()))

    (source,) = KERNELS.glob(f"*/{operator}.cu")
    target, mutant = f"operators_{mutation.build}.dir", folder / "mutant.o"
    (command,) = (
        entry["command"].replace(str(source), str(folder / source.relative_to(ROOT)))
        for entry in json.loads((BUILD_FOLDER / "compile_commands.json").read_text())
        if Path(entry["file"]).resolve() == source and target in entry["command"]
    )
    words = [w for w in shlex.split(command) if w != "-g1"]
    words[words.index("-o") + 1] = str(mutant)
    subprocess.run(words, check=True, cwd=BUILD_FOLDER)
    objects = BUILD_FOLDER / "CMakeFiles"
    others = [o for o in (objects / target).rglob("*.o") if o.name != f"{operator}.cu.o"]
    others += (objects / f"harness_{mutation.build}.dir").rglob("*.o")
    sanitize = ["-fsanitize=address,undefined", "-shared-libasan"]
    link = [compiler(), "-shared", "-o", folder / "mutant.so", mutant, *others, "-ldl"]
    link += ["-L", Path(torch.__file__).parent / "lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(link + sanitize * (mutation.build == "asan"), check=True)
    return folder / "mutant.so"


def run_pytest(arguments: list[str], chosen: dict[str, str], output: Path) -> None:
    os.environ.update(chosen)
    sys.path[:0] = chosen["PYTHONPATH"].split(os.pathsep)
    os.chdir(ROOT)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(arguments))


def files(operator: str) -> list[str]:
    return [f"tests/ops/test_{operator}.py", "tests/ops/test_cuda_values.py"]


def expression(mutation: Mutation) -> str:
    """The tests that must notice, but for those of dtypes that were not compiled."""
    others = [f"torch.{d}" for d in ELEMENTS if mutation.dtype not in (None, d)]
    return f"({mutation.tests})" + f" and not ({' or '.join(others)})" * bool(others)


def run_tests(operator: str, mutation: Mutation, library: Path) -> tuple[int | None, str]:
    """Exit code and output of the tests that must notice, in the first order that notices."""
    arguments = ["-qx", "--tb=short", "-p", "no:cacheprovider", "-p", "plugin", "-m", SELECTED]
    arguments += ["-p", "no:xdist", *files(operator), "-k", expression(mutation)]
    for order in (0, 1, 2) if mutation.build == "plain" else (0,):
        chosen = environment(library, order, sanitizers=mutation.build == "asan")
        if mutation.build == "asan":  # needs a process that loads the sanitizer first
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "--capture=sys", *arguments],  # or reports vanish
                env=os.environ | chosen, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT,
            )  # fmt: skip
            return done.returncode, done.stdout + done.stderr
        output = library.with_suffix(".log")
        process = FORKSERVER.Process(target=run_pytest, args=(arguments, chosen, output))
        process.start()
        process.join(TIMEOUT)
        assert process.exitcode is not None, process.kill()
        if process.exitcode != 0:
            break
    return process.exitcode, output.read_text()


def test_every_mutation_changes_one_place() -> None:
    """Not slow, so that whoever moves code notices what stands in mutations/."""
    for operator, mutation in all_mutations():
        count = (KERNELS / mutation.file).read_text().count(mutation.old)
        assert count == 1, f"{operator}, {mutation.id}: {count} times in {mutation.file}"


@pytest.mark.parametrize(("operator", "mutation"), MUTATIONS)
def test_mutant_is_found(operator: str, mutation: Mutation, tmp_path: Path) -> None:
    code, output = run_tests(operator, mutation, compile_mutant(operator, mutation, tmp_path))
    assert code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED), (
        f"survived {mutation.tests}\n{output[-3000:]}"
    )
    assert NOT_COMPILED not in output, f"{mutation.tests} has tests without a dtype in their names"
    assert FOUND.search(output), f"ended otherwise than by a finding\n{output[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("operator", UNCHANGED)
def test_unchanged_kernels_pass(operator: str, tmp_path: Path) -> None:
    """So that it is the change that a mutant dies of."""
    last = UNCHANGED[operator]
    same = Mutation("unchanged", last.file, last.old, last.old, last.tests, last.build, last.dtype)
    code, output = run_tests(operator, same, compile_mutant(operator, same, tmp_path))
    assert code == 0, output[-3000:]
