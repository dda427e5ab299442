"""PEFT: LoRA on a MoR model; an adapter of a shared layer serves all its recursions."""

import pytest
import torch

from .conftest import gradients, random_tokens, tiny_model

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model, **options):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kv_strategy", ["recursion", "shared"])
def test_lora_trains_saves_loads_and_merges(routing, kv_strategy, tmp_path):
    options = routing | {"kv_strategy": kv_strategy}
    model = with_lora(tiny_model(**options)).train()
    tokens = random_tokens(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        got = gradients(model)
        assert len(got) == 3 * 2 * len(TARGETS)  # unique layers, A and B
        assert all("lora_" in name for name in got)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(g.any() for name, g in got.items()), "after a step A and B both get gradients"
    assert losses[-1] < losses[0]

    model.eval()
    want = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(**options), tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, want)
    merged = loaded.merge_and_unload().eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(tokens).logits, want, atol=1e-5, rtol=1e-5)


def test_router_can_be_trained_beside_the_adapters():
    model = with_lora(tiny_model(), modules_to_save=["recursion"])
    tokens = random_tokens(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    routers = [name for name in gradients(model) if "routers" in name]
    assert len(routers) == 3
