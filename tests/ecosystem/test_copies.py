"""Models are copied, averaged, pickled, shared by threads and used in inference mode."""

import copy
import threading

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .conftest import random_tokens, tiny_model
from .test_trl import swapped_model

KINDS = {
    "expert": {"router": "expert"},
    "token": {"router": "token", "router_balancing": "loss_free"},
    "shared": {"router": "expert", "kv_strategy": "shared"},
    "recursive": {"router": None, "kv_strategy": "hybrid"},
}

TOKENS = random_tokens(2, 16)


@pytest.fixture(params=[*KINDS, "swap"])
def model(request: pytest.FixtureRequest):
    """In training mode, after a step: what a call leaves behind would be copied with it."""
    if request.param == "swap":
        model = swapped_model().train()
    else:
        model = tiny_model(**KINDS[request.param])
    model(TOKENS, labels=TOKENS).loss.backward()
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_deepcopy_after_a_step_failed(model):
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    other.train()(TOKENS, labels=TOKENS).loss.backward()


def test_average_of_a_model(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    torch.testing.assert_close(logits(average), logits(model))


def test_whole_model_through_torch_save(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    weights = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    assert (tmp_path / "model.pt").stat().st_size < 3 * weights + 2**18, "activations are not saved"


def test_inference_mode_broke_training(model):
    with torch.inference_mode():
        model.eval()(TOKENS)
        model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
        model.train()(TOKENS)
    model.zero_grad()
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    if getattr(model, "routing_metrics", None) is not None:
        model.routing_metrics.compute()


def test_threads_got_each_others_states(model):
    model.eval()
    rows = [random_tokens(1, length, seed=length) for length in (9, 17, 30, 40)]
    with torch.no_grad():
        want = [model(row, output_hidden_states=True) for row in rows]
    failures: list[str] = []

    def work(row, expected):
        with torch.no_grad():
            for _ in range(5):
                output = model(row, output_hidden_states=True)
                if not torch.allclose(output.logits, expected.logits, atol=1e-5):
                    failures.append("logits")
                if output.token_depths.shape != row.shape:
                    failures.append("depths")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(rows, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert torch.isfinite(model.train()(TOKENS, labels=TOKENS).loss)
