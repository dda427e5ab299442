"""DDP and FSDP2 on two processes give what one process gives on the same global batch.

One launch runs all cases of training.py; the tests compare what it left.
"""

from pathlib import Path

import pytest
import torch

from mor import MoRForCausalLM
from tests.distributed.launch import torchrun
from tests.distributed.training import (
    CASES,
    SAVED_AFTER,
    STEPS,
    load,
    main,
    model_of,
    optimizer_of,
    save,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.xdist_group("parallel"),
]

#: The models are float64, but Transformers' loss function computes in float32.
ROUNDING = {"rtol": 1e-6, "atol": 0.0}
SHARDED = [name for name in CASES if name.startswith("fsdp")]
#: Checkpoints that one process writes and two resume.
ALONE = ["fsdp-expert", "fsdp-token-padded"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict, Path]:
    """Each case in this process, without a process group; some leave a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    results = {}
    for name, case in CASES.items():
        model = model_of(case)
        optimizer = optimizer_of(model)
        first = train(case, model, optimizer, range(SAVED_AFTER))
        if name in ALONE:
            save(folder / f"{name}.alone", model, optimizer)
        rest = train(case, model, optimizer, range(SAVED_AFTER, STEPS))
        results[name] = {"losses": first["losses"] + rest["losses"], "model": model}
    return results, folder


@pytest.fixture(scope="module")
def together(alone) -> list[dict]:
    """What each of two processes got."""
    _, folder = alone
    assert torchrun(main.__code__.co_filename, folder).returncode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(alone, together, name):
    results, _ = alone
    losses = torch.tensor(results[name]["losses"])
    assert losses.unique().numel() == STEPS  # it trains
    for process in together:
        torch.testing.assert_close(torch.tensor(process[name]["losses"]), losses, **ROUNDING)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SHARDED])
def test_ddp_ends_with_the_weights_of_one_process(alone, together, name):
    results, _ = alone
    expected = results[name]["model"].state_dict()
    for process in together:
        assert process[name]["weights"].keys() == expected.keys()
        for key, value in process[name]["weights"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8, msg=key)
    if CASES[name].get("router_balancing") == "loss_free":
        assert expected["model.recursion.bias"].any()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_process_whose_tokens_all_left_still_takes_part(together, wrap):
    """Or the others would wait for it in the recursions it has no rows for."""
    deep, shallow = (process[f"{wrap}-token-no-rows"]["depths"] for process in together)
    assert (deep == 3).all()
    assert (shallow == 1).all()


@pytest.mark.parametrize("name", SHARDED)
def test_checkpoint_of_two_processes_goes_on_in_one(alone, together, name):
    results, folder = alone
    model = model_of(CASES[name])
    optimizer = optimizer_of(model)
    load(folder / f"{name}.checkpoint", model, optimizer)
    losses = train(CASES[name], model, optimizer, range(SAVED_AFTER, STEPS))["losses"]
    expected = results[name]["losses"][SAVED_AFTER:]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **ROUNDING)


@pytest.mark.parametrize("name", ALONE)
def test_checkpoint_of_one_process_goes_on_in_two(alone, together, name):
    results, _ = alone
    expected = torch.tensor(results[name]["losses"][SAVED_AFTER:])
    for process in together:
        losses = torch.tensor(process[f"{name}.resumed"]["losses"])
        torch.testing.assert_close(losses, expected, **ROUNDING)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_model_is_saved_whole(alone, together, name):
    results, folder = alone
    expected = results[name]["model"].state_dict()
    model = MoRForCausalLM.from_pretrained(folder / f"{name}.model", dtype=torch.float64)
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8, msg=key)


def test_recursed_block_is_gathered_once_forward_and_once_backward(together):
    """Four units: first layer, the block of two layers used three times, last layer, the rest."""
    forward, backward = together[0]["collectives"]
    assert forward == {"c10d::_allgather_base_": 4}
    # The root's parameters stay; the gradients of all uses of the block are reduced together.
    assert backward == {"c10d::_allgather_base_": 3, "c10d::_reduce_scatter_base_": 4}
