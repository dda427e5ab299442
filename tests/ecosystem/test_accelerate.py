"""Accelerate: a plain loop with gradient accumulation, against the same loop without it."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from .conftest import random_tokens, tiny_model


def test_loop_with_accumulation(routing, tmp_path):
    tokens = random_tokens(4, 12)
    if routing["router"] == "token":
        tokens = tokens[:2].repeat(2, 1)  # the balancing loss of two unlike halves is not a mean
    plain = tiny_model(**routing)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        plain(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model(**routing)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(tokens, batch_size=2)
    )
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch, labels=batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)

    accelerator.save_state(tmp_path)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]), name
