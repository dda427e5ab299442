"""DeepSpeed ZeRO-2 through transformers.Trainer: the setting in which the authors train."""

import json
from importlib.util import find_spec

import pytest

from tests.distributed.launch import torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("deepspeed"),
    pytest.mark.skipif(
        find_spec("deepspeed") is None,
        reason="no deepspeed, which is not among the pinned packages: see docs/distributed.md",
    ),
]

#: Losses are float32; two processes add up gradients in another order.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    """What two processes under ZeRO-2 got, from the start and resumed."""
    from tests.distributed.deepspeed_training import main

    folder = tmp_path_factory.mktemp("runs")
    assert torchrun(main.__code__.co_filename, folder, timeout=500).returncode == 0
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("name", ["expert", "token", "shared"])
def test_losses_are_those_of_one_process_and_go_on_after_a_checkpoint(losses, name, tmp_path):
    from tests.distributed.deepspeed_training import run

    alone = run(name, tmp_path, None, batch_size=4)
    assert len(set(alone)) == len(alone), "it trains"
    assert losses[name] == pytest.approx(alone, rel=ROUNDING)
    assert losses[f"{name} resumed"] == losses[name]
