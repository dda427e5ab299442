"""examples/train_fsdp.py on two processes, then on one, from the checkpoint of the two."""

import re
import shutil

import pytest

import mor
from tests.distributed.launch import ROOT, torchrun


def _losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+: loss (\S+)", output, re.M)]


@pytest.mark.timeout(300)
def test_run_goes_on_with_another_number_of_processes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * n % 97} and {n % 13}" for n in range(1500)))
    runs = tmp_path / "runs"
    command = [ROOT / "examples" / "train_fsdp.py", "--data", text, "--output-dir", runs]
    command += ["--steps", 5, "--save-every", 3, "--seq-len", 32, "--batch-size", 4]
    whole = torchrun(*command)
    assert whole.returncode == 0
    losses = _losses(whole.output)
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 1

    shutil.rmtree(runs / "model")
    (runs / "step-5" / ".metadata").unlink()  # as if killed while it was written
    rest = torchrun(*command, "--resume", processes=1)
    assert rest.returncode == 0
    assert _losses(rest.output) == pytest.approx(losses[3:], rel=1e-4)
    mor.MoRForCausalLM.from_pretrained(runs / "model")
