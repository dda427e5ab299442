"""A plain PyTorch loop, in float32 and under bf16 autocast."""

import pytest
import torch

from .conftest import random_tokens, tiny_model


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_plain_loop_learns(routing, bf16):
    model = tiny_model(**routing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = random_tokens(4, 16)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.lm_loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 1.0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_autocast_stays_close_to_float32(routing):
    model = tiny_model(**routing)
    tokens = random_tokens(2, 16)
    exact = model(tokens, labels=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens, labels=tokens)
    assert mixed.logits.dtype == torch.bfloat16
    assert 0 < (mixed.lm_loss - exact.lm_loss).abs() < 0.05
