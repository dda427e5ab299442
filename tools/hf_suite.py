"""Runs Hugging Face's own model tests on the MoR models.

    python tools/hf_suite.py build/hf-suite

The tests come from the source distribution of the installed Transformers, their subclasses for MoR
from the folder that MOR_HF_SUITE names. Whatever of them cannot hold for MoR stands in `EXPECTED`
with its reason, and must go on failing; all else must pass.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = Path(os.environ.get("MOR_HF_SUITE", ROOT / ".." / "shared" / "outside" / "hf_suite"))

#: Test, or Class.test, and why it cannot hold.
EXPECTED = {
    "test_can_set_attention_dynamically": "asks for eager attention, which MoR lacks",
    "test_retain_grad_hidden_states_attentions": "asks for eager attention",
    "test_num_layers_is_small": "their tester has 5 layers: 3 recursions need as many",
    "test_generation_tester_mixin_inheritance": "of their tester class, not of the model",
    "test_tp_plan_matches_params": "tensor parallelism is not supported",
    "test_tied_head_has_a_tp_plan_entry": "tensor parallelism is not supported",
}


def main() -> None:
    """Lays the tests out, runs them, compares what failed with `EXPECTED`."""
    if not (SUITE / "setup.sh").exists():
        print(f"hf_suite: skipped: no {SUITE} (set MOR_HF_SUITE)")
        return
    folder = Path(sys.argv[1]).resolve()
    subprocess.run(["bash", SUITE / "setup.sh", folder, sys.executable], check=True)
    (folder / "pytest.ini").write_text("[pytest]\n")  # not ours, which knows none of their marks
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:warnings", "--tb=line"]
    subprocess.run([*command, f"--junitxml={report}", "tests/models/mor"], cwd=folder, check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed, passed, skipped = set(), 0, 0
    for case in cases:
        name = (
            f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name', '').split('[')[0]}"
        )
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    unexpected = {name for name in failed if not _reasons(name)}
    healed = {listed for listed in EXPECTED if not any(listed in _reasons(name) for name in failed)}
    print(f"hf_suite: {passed} passed, {skipped} skipped, {len(failed)} failed as listed")
    for name in sorted(unexpected):
        print(f"hf_suite: {name} failed")
    for listed in sorted(healed):
        print(f"hf_suite: {listed} passes now: take it from the list")
    if not cases or unexpected or healed:
        sys.exit(1)


def _reasons(name: str) -> list[str]:
    """The entries of `EXPECTED` that name a test."""
    return [listed for listed in EXPECTED if listed in (name, name.partition(".")[2])]


if __name__ == "__main__":
    main()
