"""The tests of this folder find seeded bugs: a mutant that survives is a missing test.

`make mutation-test` runs every one of mutations/; `make test` a few. Only the binding concerned is
compiled, and only for one dtype.
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
from conftest import BUILD_FOLDER, HERE, MUTANT, UNDER_SANITIZERS, build, compiler
from mutations import Mutation, all_mutations
from simt import DTYPES
from test_simt_sanitizers import sanitizer_environment

pytestmark = pytest.mark.skipif(UNDER_SANITIZERS or MUTANT is not None, reason="an inner run")
KERNELS = HERE.parents[1] / "kernels"
TIMEOUT = 300  # seconds, for tests that take one
# Its processes begin with torch and mor imported, which takes longer than the tests.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pytest", "mor.ops"])
ELEMENTS = ("float", "__nv_bfloat16", "__half", "double")
# Among them an integer division by zero, which x86 traps every time, whatever lies in memory. A
# segmentation fault is not: where a stray address leads is chance, and bounds are the asan build's.
FOUND = re.compile(
    r"^E +(assert |AssertionError|RuntimeError: .*(race on|never written|barrier|deadlock))"
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


def compile_mutant(binding: str, mutation: Mutation, folder: Path) -> Path:
    """The binding alone, compiled from a changed copy of kernels/ as CMake compiles it."""
    library = build(mutation.build)  # its harness and self tests serve again
    shutil.copytree(KERNELS, folder / "kernels")
    bindings = folder / "tests/simt/bindings"
    shutil.copytree(HERE / "bindings", bindings)
    changed = folder / "kernels" / mutation.file
    changed.write_text(changed.read_text().replace(mutation.old, mutation.new))

    objects, target = library.parent / "CMakeFiles", f"kernels_{mutation.build}.dir"
    source, mutant = HERE / "bindings" / f"{binding}.cpp", folder / "mutant.o"
    (command,) = (
        entry["command"].replace(str(source), str(bindings / source.name))
        for entry in json.loads((BUILD_FOLDER / "compile_commands.json").read_text())
        if entry["file"] == str(source) and target in entry["command"]
    )
    words = [w for w in shlex.split(command) if w != "-g"]
    words[words.index("-o") + 1] = str(mutant)
    if mutation.dtype is not None:
        code = [str(d) for d in DTYPES].index(f"torch.{mutation.dtype}")
        words += [f"-DSIMT_DTYPE={code}", f"-DSIMT_ELEMENT={ELEMENTS[code]}"]
    subprocess.run(words, check=True, cwd=BUILD_FOLDER)
    others = [objects / target / "bindings/selftest.cpp.o"]
    others += sorted((objects / f"simt_{mutation.build}.dir").rglob("*.o"))
    sanitize = ["-fsanitize=address,undefined", "-shared-libasan"]
    link = [compiler(), "-shared", "-o", folder / "mutant.so", mutant, *others, "-ldl"]
    subprocess.run(link + sanitize * (mutation.build == "asan"), check=True)
    return folder / "mutant.so"


def run_pytest(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment)
    os.chdir(HERE)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(arguments))


def run_tests(binding: str, mutation: Mutation, library: Path) -> tuple[int | None, str]:
    """Exit code and output of the tests that must notice."""
    environment = {"MOR_SIMT_MUTANT": f"{mutation.build}:{library}"}
    wanted = f"({mutation.tests})"
    if mutation.dtype is not None:  # the others were not compiled
        wanted += "".join(f" and not {d}" for d in DTYPES if str(d) != f"torch.{mutation.dtype}")
    arguments = ["-qx", "--tb=short", "-p", "no:cacheprovider"]
    arguments += [f"test_simt_{binding}.py", "-k", wanted]
    if mutation.build == "asan":  # needs a process that loads the sanitizer first
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--capture=sys", *arguments],  # or a report is lost
            env=os.environ | environment | sanitizer_environment(),
            capture_output=True, text=True, cwd=HERE, timeout=TIMEOUT,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr
    output = library.with_suffix(".log")
    process = FORKSERVER.Process(target=run_pytest, args=(arguments, environment, output))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode is not None, process.kill()
    return process.exitcode, output.read_text()


def test_every_mutation_changes_one_place() -> None:
    """Not slow, so that whoever moves code notices what stands in mutations/."""
    for binding, mutation in all_mutations():
        count = (KERNELS / mutation.file).read_text().count(mutation.old)
        assert count == 1, f"{binding}, {mutation.id}: {count} times in {mutation.file}"


@pytest.mark.parametrize(("binding", "mutation"), MUTATIONS)
def test_mutant_is_found(binding: str, mutation: Mutation, tmp_path: Path) -> None:
    code, output = run_tests(binding, mutation, compile_mutant(binding, mutation, tmp_path))
    assert code != 0, f"survived {mutation.tests}\n{output[-3000:]}"
    assert FOUND.search(output), f"ended otherwise than by a finding\n{output[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("binding", UNCHANGED)
def test_unchanged_kernels_pass(binding: str, tmp_path: Path) -> None:
    """So that it is the change that a mutant dies of."""
    last = UNCHANGED[binding]
    same = Mutation("unchanged", last.file, last.old, last.old, last.tests, last.build, last.dtype)
    code, output = run_tests(binding, same, compile_mutant(binding, same, tmp_path))
    assert code == 0, output[-3000:]
