"""On a GPU a model computes what it computes on the CPU: steps, generation, cached or compiled."""

import copy

import pytest
import torch

from .conftest import MODELS, small_model
from .test_generation import padded, prompts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

#: Routers whose forward asks the device how many tokens stay (docs/operators.md).
ASKING = ("token", "hybrid", "swap-token")


def step(model, tokens, **inputs):
    """The loss and every gradient, on the CPU, in the dtype of the weights."""
    output = model(tokens, labels=tokens, use_cache=False, **inputs)
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach().cpu(), gradients


@pytest.mark.parametrize("pads", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step(kind, pads):
    model = MODELS[kind]().double().train()
    tokens, mask = padded([24, 17, 3], "left") if pads else (prompts(3, 24), None)
    loss, gradients = step(copy.deepcopy(model), tokens, attention_mask=mask)
    mask = mask.cuda() if pads else None
    got, on_device = step(model.cuda(), tokens.cuda(), attention_mask=mask)
    # Router scores are float32 in every model, so float64 is not reached.
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(on_device, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_generation(kind, dtype):
    """Cached greedy tokens are those of the full forward, and in float32 those of the CPU."""
    model = MODELS[kind]().eval().to(dtype)
    tokens, mask = padded([9, 12, 4], "left")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    want = model.generate(tokens, attention_mask=mask, **options)
    got = model.cuda().generate(tokens.cuda(), attention_mask=mask.cuda(), **options)
    if dtype == torch.float32:
        assert torch.equal(got.sequences.cpu(), want.sequences)
        torch.testing.assert_close(
            torch.stack(got.logits).cpu(), torch.stack(want.logits), atol=1e-4, rtol=0
        )
    assert torch.stack(got.logits).isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ASKING])
def test_a_training_step_asks_the_device_nothing(kind):
    model, tokens = MODELS[kind]().cuda().train(), prompts(2, 16).cuda()
    model(tokens, labels=tokens, use_cache=False).loss.backward()  # buffers made at first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["expert", "token", "shared", "recursive"])
def test_compiled_training(kind):
    model, tokens = MODELS[kind]().cuda().train(), prompts(2, 32).cuda()
    loss, gradients = step(copy.deepcopy(model), tokens)
    got, compiled = step(torch.compile(model, dynamic=False), tokens)
    torch.testing.assert_close(got, loss)
    compiled = {name.removeprefix("_orig_mod."): g for name, g in compiled.items()}
    torch.testing.assert_close(compiled, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ["expert", "token"])
def test_training_in_bfloat16_learns(router):
    """Autocast, AdamW, 40 steps on one batch: the loss falls by half."""
    model, tokens = small_model(router=router).cuda().train(), prompts(8, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    assert last < first / 2, (first, last)
