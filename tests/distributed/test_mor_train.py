"""`torchrun -m mor train`: two processes train as one does, and a killed run goes on exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mor.training.options import RunOptions
from mor.training.run import prepare_run, train
from tests.distributed.interrupted_run import main
from tests.distributed.launch import torchrun

pytestmark = pytest.mark.xdist_group("mor_train")
STEPS, SAVE, KILL = 6, 2, 5


@pytest.fixture(scope="module", params=["expert", pytest.param("token", marks=pytest.mark.slow)])
def options(request, tmp_path_factory) -> dict:
    """A run with the global batch of one process; two of them take half of it each."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * n % 97} and {n % 13}" for n in range(60)))
    return {
        "data": str(text),
        "router": request.param,
        "vocab_size": 300,
        "seq_len": 16,
        "layers": 5,
        "hidden_size": 32,
        "heads": 2,
        "steps": STEPS,
        "batch_size": 4,
        "log_every": 1,
        "eval_every": 3,
        "eval_rows": 4,
        "save_every": SAVE,
        "report_to": "none",
        "progress": False,
    }


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory) -> tuple[Path, Path]:
    """A whole run on two processes, and one that was killed and resumed by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    halved = json.dumps({**options, "batch_size": options["batch_size"] // 2})
    assert torchrun(main.__code__.co_filename, halved, whole, killed, KILL).returncode != 0
    assert (whole / "model").exists()
    assert not (killed / "model").exists()
    resume = ["-m", "mor", "train", "--output-dir", killed, "--resume"]
    assert torchrun(*resume).returncode == 0
    return whole, killed


def _log(folder: Path) -> list[dict]:
    """The numbers of a run that do not depend on time."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    timed = ("second", "runtime", "train_loss")
    lines = [
        {key: value for key, value in line.items() if not any(word in key for word in timed)}
        for line in state["log_history"]
    ]
    return [line for line in lines if "loss" in line or "eval_loss" in line]


def test_two_processes_log_what_one_does(options, runs, tmp_path):
    trainer, _ = prepare_run(RunOptions(output_dir=tmp_path, **options))
    train(trainer, None)
    alone, together = _log(tmp_path), _log(runs[0])
    assert len(alone) == len(together) == STEPS + 2
    own = set()
    if options["router"] == "token":
        # A new token-choice router nearly ties: after gradients are summed in another order, single
        # tokens choose another depth. And the balancing loss is a product of two means, each over
        # a process's own tokens.
        alone, together = alone[:1], together[:1]
        own = {"balancing_loss", "loss", "grad_norm"}
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - own:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key


def test_killed_run_goes_on_exactly(runs):
    whole, killed = runs
    assert _log(killed) == _log(whole)
    expected = load_file(whole / "model" / "model.safetensors")
    for name, value in load_file(killed / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_processes_share_one_set_of_tokens(runs):
    for folder in runs:
        assert len(list(folder.glob("tokens-*"))) == 1
        assert not list(folder.glob(".tokens-*"))
