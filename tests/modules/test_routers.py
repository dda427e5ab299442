"""Routers and their losses against what the paper writes."""

import pytest
import torch

from mor import MoRForCausalLM
from mor.modules import MixtureOfRecursions, Router, RouterScore
from mor.modules.routers import aux_loss, balancing_loss, z_loss
from tests.models.conftest import small_model


@pytest.mark.parametrize(("kind", "width"), [("linear", 0), ("mlp", 2), ("wide_mlp", 4)])
def test_router_sizes(kind, width):
    router = Router(8, 3, kind)
    sizes = [tuple(layer.weight.shape) for layer in router.layers]
    assert sizes == ([(3, 8)] if not width else [(8 * width, 8), (3, 8 * width)])
    assert router(torch.randn(5, 8)).shape == (5, 3)


def test_logits_are_float32_in_any_model():
    router = Router(8, temperature=2.0).to(torch.bfloat16)
    x = torch.randn(5, 8).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)
    assert logits.dtype == torch.float32
    want = x.double() / 2 @ router.layers[0].weight.double().T
    torch.testing.assert_close(logits.double(), want, atol=1e-6, rtol=1e-5)


def test_losses():
    logits = torch.tensor([2.0, -1.0, 0.5])
    p = logits.sigmoid()
    want = -(p[0].log() + (1 - p[1]).log() + p[2].log()) / 3
    torch.testing.assert_close(aux_loss(logits, torch.tensor([0, 2])), want)
    scores = torch.full((6, 3), 1 / 3)
    torch.testing.assert_close(
        balancing_loss(scores, torch.tensor([0, 0, 1, 1, 2, 2])), torch.tensor(1.0)
    )
    torch.testing.assert_close(z_loss(torch.tensor([[3.0], [1.0]])), torch.tensor(5.0))


def test_losses_of_no_tokens_are_zero_and_have_gradients():
    empty = torch.empty(0, 3, requires_grad=True)
    rows = torch.empty(0, dtype=torch.int64)
    total = aux_loss(empty[:, 0], rows) + balancing_loss(empty, rows) + z_loss(empty)
    total.backward()
    assert total == 0
    assert empty.grad is not None


def test_bad_options():
    with pytest.raises(ValueError, match="router_type: expected one of"):
        Router(8, router_type="conv")
    with pytest.raises(ValueError, match="temperature: expected"):
        Router(8, temperature=-1)
    with pytest.raises(ValueError, match="score: expected a function of"):
        RouterScore("relu", 1.0)


def test_bfloat16_model_counts_loads_exactly():
    """In bfloat16 257 is 256: the loads are no part of the model that is cast."""
    model = small_model(router="token", router_balancing="loss_free").bfloat16().train()
    model(torch.randint(3, 90, (2, 150)))
    model(torch.randint(3, 90, (2, 150)))
    assert model.model.recursion.load.sum() == 600


def test_bfloat16_model_updates_its_bias_exactly(tmp_path):
    """In bfloat16 0.5 - 0.001 is 0.498 and 0.5 + 0.001 is 0.5: the bias stays in float32."""
    model = small_model(router="token", router_balancing="loss_free")
    model.model.recursion.bias.fill_(0.5)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for other in (model, loaded):
        choice = other.model.recursion
        assert other.lm_head.weight.dtype == torch.bfloat16
        choice.load = torch.tensor([9.0, 0.0, 0.0])
        choice.update_bias()
        torch.testing.assert_close(choice.bias, torch.tensor([0.499, 0.501, 0.501]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_moved_between_dtypes_keep_bias_and_loads(dtype):
    model = small_model(router="token", router_balancing="loss_free").to(dtype).float().half()
    choice = model.model.recursion
    choice.bias.fill_(1 / 3)
    model.to(dtype)
    assert choice.bias.dtype == torch.float32
    assert choice.bias[0] == torch.tensor(1 / 3)
    assert choice.load.dtype == torch.int64


@pytest.mark.parametrize("router", ["expert", "token"])
def test_left_pads_do_not_move_the_random_routers_scores(router):
    """They are a hash of positions, which counted the pads of a decoding loop without any."""
    model = small_model(router=router, router_type="random").eval()
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    with torch.no_grad():
        batch = model(tokens, attention_mask=mask)
        alone = model(tokens[1:, 4:])
    assert torch.equal(batch.token_depths[1, 4:], alone.token_depths[0])
    torch.testing.assert_close(batch.logits[1, 4:], alone.logits[0], atol=1e-5, rtol=1e-5)


def test_a_router_is_a_module_that_is_called():
    """Its weight was read past it: hooks, adapters and parametrisations changed nothing."""
    layer = MixtureOfRecursions(torch.nn.Identity(), 8, 2, capacities=[1.0, 1.0])
    x, calls = torch.randn(1, 6, 8), []
    for router in layer.recursion.routers:
        router.layers[0].register_forward_hook(lambda m, args, out: calls.append(1))
    layer(x)
    assert len(calls) == 2
    zero = torch.nn.utils.parametrize.register_parametrization
    for router in layer.recursion.routers:
        zero(router.layers[0], "weight", Zeros())
    layer(x)
    assert not any(step.logits.any() for step in layer.routing.steps)


class Zeros(torch.nn.Module):
    def forward(self, weight):
        return weight * 0
