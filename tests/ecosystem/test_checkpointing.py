"""Activation checkpointing that users put around a model or its layers themselves."""

import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from .conftest import gradients, random_tokens, tiny_model
from .test_trl import swapped_model

KINDS = {
    "expert": {"router": "expert", "capacity_warmup_steps": 4},
    "token": {"router": "token", "router_balancing": "loss_free", "router_z_coef": 0.01},
    "shared": {"router": "expert", "kv_strategy": "shared"},
}


def counted(model) -> dict:
    recursion = next(m for m in model.modules() if hasattr(m, "warmup_step"))
    load = getattr(recursion, "load", None)
    return {
        "step": int(recursion.warmup_step),
        "load": None if load is None else load.tolist(),
        "metrics": recursion.metrics.compute(),
    }


def compare(model, loss_of, plain_loss_of) -> None:
    """Loss, gradients and counters of a model and its copy without checkpoints."""
    plain, got = copy.deepcopy(model), model
    want_loss, loss = plain_loss_of(plain), loss_of(got)
    want_loss.backward()
    loss.backward()
    torch.testing.assert_close(loss, want_loss)
    want = gradients(plain)
    for name, gradient in gradients(got).items():
        name = name.replace("_checkpoint_wrapped_module.", "")
        torch.testing.assert_close(gradient, want.pop(name), msg=name)
    assert not want
    assert counted(got) == counted(plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "swap"])
def test_checkpoint_around_the_decoder_counted_twice(name, reentrant):
    model = swapped_model().train() if name == "swap" else tiny_model(**KINDS[name])
    tokens = random_tokens(2, 16)

    def plain(model):
        embedded = model.get_input_embeddings()(tokens)
        output = model.model(inputs_embeds=embedded)
        return output.last_hidden_state.square().mean() + output.router_loss

    def checkpointed(model):
        def run(embedded):
            output = model.model(inputs_embeds=embedded)
            return output.last_hidden_state, output.router_loss

        embedded = model.get_input_embeddings()(tokens)
        hidden, router_loss = checkpoint(run, embedded, use_reentrant=reentrant)
        return hidden.square().mean() + router_loss

    compare(model, checkpointed, plain)


@pytest.mark.parametrize("name", [*KINDS, "swap", "swap token"])
def test_checkpoint_wrapper_around_decoder_layers(name):
    """With the default use_cache, at which the recomputation once appended to the cache again."""
    if name.startswith("swap"):
        router = "token" if name.endswith("token") else "expert"
        model = swapped_model(router=router).train()
    else:
        model = tiny_model(**KINDS[name])
    tokens = random_tokens(2, 16)

    def plain(model):
        return model(tokens, labels=tokens).loss

    def checkpointed(model):
        layers = set(model.model.layers)
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: m in layers
        )
        return plain(model)

    compare(model, checkpointed, plain)
