"""torch.compile(fullgraph=True): one graph, compiled once, equal to eager, forward and backward.

The default run compiles with `aot_eager` (the same graphs, without generating code); the slow one
with inductor and more variants.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .conftest import ROUTING, gradients, random_tokens, tiny_model

MORE = {
    "expert-shared": {"router": "expert", "kv_strategy": "shared"},
    "expert-aux-router": {"router": "expert", "router_aux": "router"},
    "token-hybrid": {"router": "token", "kv_strategy": "hybrid"},
    "token-loss-free": {"router": "token", "router_balancing": "loss_free"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leave_after_the_first_recursion(model) -> None:
    """Makes every token do so: no score is above 0, and the first of equal scores wins."""
    routers = [m for name, m in model.named_modules() if name.endswith(("router", "routers.1"))]
    with torch.no_grad():
        for router in routers:
            for parameter in router.parameters():
                parameter.zero_()


def check(options: dict, backend: str, training: bool) -> None:
    model = tiny_model(**options).train(training)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tolerance = {"atol": 2e-6, "rtol": 1e-5}
    active = set()
    for call in range(4):
        if call == 3 and options["router"] is not None:
            leave_after_the_first_recursion(model)
        tokens = random_tokens(2, 16, seed=call)
        inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        results = []
        for run in (model, compiled):
            model.zero_grad(set_to_none=True)
            output = run(**inputs)
            output.loss.backward()
            results.append((output, gradients(model)))
        (want, grads), (got, compiled_grads) = results
        torch.testing.assert_close(got.loss, want.loss, **tolerance)
        torch.testing.assert_close(got.logits, want.logits, **tolerance)
        assert torch.equal(got.token_depths, want.token_depths)
        for name, grad in compiled_grads.items():
            # A layer that eager evaluation did not call has no gradient there, and zeros here.
            torch.testing.assert_close(
                grad, grads.get(name, torch.zeros_like(grad)), **tolerance, msg=name
            )
        assert grads.keys() <= compiled_grads.keys()
        active.add(tuple(want.token_depths.flatten().bincount(minlength=4).tolist()))
    assert counter.frame_count == 1, "compiled again, though the shape of the batch is the same"
    if options["router"] == "token" or (options["router"] == "expert" and not training):
        assert len(active) > 2, "the numbers of active tokens should have changed"
        assert (0, 32, 0, 0) in active, "a step without tokens should have been tried"


@pytest.mark.parametrize("name", ROUTING)
def test_training_step_is_one_graph(name):
    check(ROUTING[name], "aot_eager", training=True)


def test_training_step_of_a_relaxed_model_is_one_graph():
    options = {"router": "expert", "relaxation": "lora", "relaxation_rank": 2}
    check({**options, "recursion_encoding": True}, "aot_eager", training=True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", [*ROUTING, *MORE])
def test_generated_code(name, training):
    check((ROUTING | MORE)[name], "inductor", training)


@pytest.mark.parametrize(
    "name",
    ["recursive", *(pytest.param(n, marks=pytest.mark.slow) for n in ("expert", "token"))],
)
def test_compiled_autocast_and_optimizer_steps(name):
    """The ordinary use: bf16 autocast, weights that change, `model.compile()`."""
    tokens = random_tokens(2, 16)
    losses = []
    # After bfloat16 steps a token's choice between two depths may differ by that order.
    autocast = name != "token"
    for compile_it in (False, True):
        model = tiny_model(**ROUTING[name])
        if compile_it:
            model.compile(fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert losses[2] < losses[0] - 0.1
    torch.testing.assert_close(losses[3], losses[0])
    # bfloat16 gradients of a shared layer's uses are added in another order.
    torch.testing.assert_close(losses[4:], losses[1:3], atol=2e-3, rtol=0)
