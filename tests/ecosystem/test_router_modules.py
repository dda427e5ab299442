"""Routers are linear layers that are called: whatever is put on, in or around one takes effect.

Their weights were once read past their modules: adapters, hooks and quantised layers did nothing.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mor

from .conftest import random_tokens, tiny_model
from .test_trl import swapped_model

KINDS = {
    "expert": {"router": "expert"},
    "mlp": {"router": "expert", "router_type": "mlp"},
    "aux": {"router": "expert", "router_aux": "router"},
    "token": {"router": "token"},
}

TOKENS = random_tokens(2, 16)


@pytest.fixture(params=[*KINDS, "swap"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "swap":
        return swapped_model().eval()
    return tiny_model(**KINDS[request.param]).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The first linear layer of each router, by name; those that evaluation asks."""
    found = {
        name: module
        for name, module in model.named_modules()
        if ".router" in name and isinstance(module, nn.Linear)
    }
    assert found
    return found


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_lora_on_all_linear_layers_was_dead_on_routers(model, start):
    peft = pytest.importorskip("peft")
    want = logits(model)
    config = peft.LoraConfig(
        r=1, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).train()
    torch.testing.assert_close(logits(adapted.eval()), want, atol=2e-4, rtol=1e-3)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, so A learns from the second step on
        optimizer.zero_grad()
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    routers = {n: p for n, p in adapted.named_parameters() if ".router" in n and "lora" in n}
    assert len(routers) >= 2
    assert all(p.grad is not None and p.grad.any() for p in routers.values())
    want = logits(adapted.eval())
    torch.testing.assert_close(logits(adapted.merge_and_unload()), want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_routers_answered_hundreds_of_times_too_large(model, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model.save_pretrained(tmp_path)
    load = mor.load_swapped if hasattr(model.config, "mor_swap") else type(model).from_pretrained
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantised = load(tmp_path, quantization_config=config, device_map="cpu").eval()
    both = torch.stack([logits(model).flatten(), logits(quantised).flatten().float()])
    assert torch.corrcoef(both)[0, 1] > 0.5
    scores = []
    for each in (model, quantised):
        seen: list[torch.Tensor] = []
        router = next(m for n, m in each.named_modules() if n.endswith(("router", "routers.0")))
        hook = router.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        logits(each)
        hook.remove()
        scores.append(seen[0])
    assert scores[1].dtype == torch.float32
    assert 0.5 < float(scores[1].std() / scores[0].std()) < 2


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamically_quantised(model):
    want = logits(model)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    both = torch.stack([want.flatten(), logits(quantised).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.8


@pytest.mark.parametrize("how", ["disk_offload", "device_map"])
def test_offloaded_routers_read_memory_that_nobody_wrote(model, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want = logits(model)
    if how == "disk_offload":
        accelerate.disk_offload(model, tmp_path)
    else:
        load = (
            mor.load_swapped if hasattr(model.config, "mor_swap") else type(model).from_pretrained
        )
        model.save_pretrained(tmp_path / "model")
        model = load(
            tmp_path / "model",
            device_map="auto",
            max_memory={"cpu": "60KB"},
            offload_folder=tmp_path / "offloaded",
        ).eval()
    assert any(p.device.type == "meta" for p in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)


def changed(model: nn.Module, change) -> bool:
    """Whether something done to the routers' linear layers changes the logits."""
    before = logits(model)
    for linear in linears(model).values():
        change(linear)
    return not torch.allclose(logits(model), before, atol=1e-6)


def test_pruned(model):
    assert changed(model, lambda linear: prune.random_unstructured(linear, "weight", amount=0.7))


def test_parametrised(model):
    assert changed(model, parametrizations.spectral_norm)


def test_hooked(model):
    hooks = []
    assert changed(
        model,
        lambda linear: hooks.append(linear.register_forward_hook(lambda _, args, out: -out)),
    )
    assert len(hooks) == len(linears(model))


def test_functional_call(model):
    want, name = logits(model), next(iter(linears(model)))
    weights = {f"{name}.weight": -linears(model)[name].weight.detach()}
    with torch.no_grad():
        got = torch.func.functional_call(model, weights, (TOKENS,)).logits
    assert not torch.allclose(got, want, atol=1e-6)
    assert torch.equal(logits(model), want), "the model itself is as before"
