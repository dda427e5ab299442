"""Models of the sister systems under FSDP2 give what one process gives on the same batch."""

import pytest
import torch

from tests.distributed.launch import torchrun
from tests.distributed.sister_training import MODELS, STEPS, main, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.xdist_group("sister_systems"),
]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert torchrun(main.__code__.co_filename, folder).returncode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("system", MODELS)
def test_two_processes_train_as_one(together, system):
    alone = train(system)
    assert len(set(alone["losses"])) == STEPS
    for process in together:
        losses = torch.tensor(process[system]["losses"])
        torch.testing.assert_close(losses, torch.tensor(alone["losses"]), rtol=1e-6, atol=0.0)
    whole = together[0][system]["weights"]
    assert whole.keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("system", MODELS)
def test_half_precision_loses_no_loss(together, system):
    """A mixed-precision policy rebuilds the arguments of every layer."""
    want = together[0][system]["losses"][0]
    assert together[0][system]["half"] == pytest.approx(want, rel=0.02)
