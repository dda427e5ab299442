"""The random router: the ablation's baseline, and as causal and cacheable as any other."""

import pytest
import torch

import mor
from mor import MoRConfig
from mor.modules import ExpertChoice, TokenChoice
from mor.modules.routers import RandomRouter

from .conftest import small_config, small_model
from .test_conversion import dense_models
from .test_generation import generate_greedily, prompts
from .test_modeling_mor import train_step

ROUTERS = ["expert", "token"]


def random_model(router, **options):
    return small_model(router=router, router_type="random", **options)


def random_swap(router):
    return mor.swap(
        dense_models()["llama"], (1, 7), num_recursions=3, router=router, router_type="random"
    )


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_uniform_and_independent(training):
    router = RandomRouter(3).train(training)
    torch.manual_seed(0)
    scores = router(torch.empty(20000, 8), torch.arange(20000)).double()
    assert scores.shape == (20000, 3)
    assert 0 <= scores.min() <= scores.max() < 1
    quantiles = torch.quantile(scores, torch.tensor([0.1, 0.5, 0.9]).double(), dim=0)
    torch.testing.assert_close(
        quantiles, torch.tensor([[0.1], [0.5], [0.9]]).double().expand(3, 3), atol=0.015, rtol=0
    )
    others = RandomRouter(1, step=1).train(training)(torch.empty(20000, 8), torch.arange(20000))
    with_next = torch.cat([scores[1:], scores[:-1, :1], others[1:].double()], 1)
    off_diagonal = torch.corrcoef(with_next.T) - torch.eye(5)
    assert off_diagonal.abs().max() < 0.03


@pytest.mark.parametrize("router", ROUTERS)
def test_training_draws_anew_and_has_no_router_losses(router):
    model = random_model(router, router_z_coef=0.1).train()
    assert not list(model.model.recursion.parameters())
    tokens = prompts(2, 24)
    first, second = (model(tokens, labels=tokens) for _ in range(2))
    assert first.router_loss is None
    assert not torch.equal(first.token_depths, second.token_depths)
    first.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    if router == "expert":  # capacities 1, 2/3, 1/3 of 24
        assert [int((first.token_depths[0] >= step).sum()) for step in (1, 2, 3)] == [24, 16, 8]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [random_model, random_swap], ids=["model", "swap"])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradient_checkpointing_does_not_draw_again(router, make, reentrant):
    model = make(router)
    routing = next(m for m in model.modules() if isinstance(m, ExpertChoice | TokenChoice))
    depths = []
    routing.register_forward_hook(lambda module, args, output: depths.append(output.depths))
    tokens = prompts(2, 16)
    torch.manual_seed(5)
    plain, grads = train_step(model, input_ids=tokens, labels=tokens)
    next_number = torch.rand(())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(5)
    output, again = train_step(model, input_ids=tokens, labels=tokens)
    assert torch.equal(torch.rand(()), next_number)
    assert len(depths) == 2  # routed once in each forward, and not again in the backward
    assert torch.equal(*depths)
    assert torch.equal(output.loss, plain.loss)
    assert again.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_takes_the_share_of_training(router):
    model = random_model(router, num_hidden_layers=5).eval()
    tokens = prompts(1, 3000)
    with torch.no_grad():
        depths = model.model(tokens).token_depths
    shares = [float((depths >= step).float().mean()) for step in (1, 2, 3)]
    assert shares == pytest.approx([1, 2 / 3, 1 / 3], abs=0.03)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_is_causal_and_cached_generation_is_exact(router):
    model = random_model(router).eval()
    tokens = prompts(2, 12)
    changed = tokens.clone()
    changed[:, 8:] = 5
    sequences, logits = generate_greedily(model, tokens)
    with torch.no_grad():
        full = model(sequences[:, :-1]).logits
        before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(logits, full[:, 11:], atol=1e-4, rtol=0)
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-5, rtol=0)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-3


def test_the_score_is_the_number_itself():
    config = small_config(router_type="random")
    assert (config.router_func, config.router_alpha) == ("none", 0.1)
    assert MoRConfig(**config.to_dict()).router_func == "none"
    with pytest.raises(ValueError, match="random scores are used as they are, got sigmoid"):
        small_config(router_type="random", router_func="sigmoid")


@pytest.mark.parametrize("options", [{"capacities": [1.0] * 3}, {"balance_warmup_steps": 1}])
def test_residual_gating_with_an_even_gate_is_the_block_itself(options):
    """An untrained router's gate is 1, and f(H) takes the place of H."""
    router = "expert" if "capacities" in options else "token"
    model = small_model(router=router, router_gating="residual", **options)
    with torch.no_grad():
        for weight in model.model.recursion.parameters():
            weight.zero_()
    plain = small_model(router=None)
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = prompts(2, 12)
    with torch.no_grad():
        output = model.train()(tokens)  # training: the warm-up takes every token all the way
        want = plain(tokens).logits
    assert (output.token_depths == 3).all()
    torch.testing.assert_close(output.logits, want, atol=1e-5, rtol=1e-5)


def test_residual_gating_by_hand():
    """`H + g (f(H) - H)` and, for a token of depth i, `x + g (f^i(x) - x)`."""
    from mor.modules import ExpertChoice, RouterScore, TokenChoice, pack

    hidden = torch.randn(6, 8)
    packing = pack((1, 6), hidden.device).packing

    def double(x, *args):
        return 2 * x

    score = RouterScore("sigmoid", 0.5)
    expert = ExpertChoice(8, 1, score=score, gating="residual").eval()
    gates = 0.5 * expert.routers[0](hidden).sigmoid()
    torch.testing.assert_close(expert(hidden, packing, double).hidden, hidden + gates * hidden)
    token = TokenChoice(8, 2, score=score, gating="residual", std=1.0).eval()
    best, choice = (0.5 * token.router(hidden).sigmoid()).max(1, keepdim=True)
    want = hidden + best * (2.0 ** (choice + 1) - 1) * hidden
    torch.testing.assert_close(token(hidden, packing, double).hidden, want)
