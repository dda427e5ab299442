"""Parameter groups, and the auxiliary routers' own learning rate."""

import pytest
import torch
from transformers import get_constant_schedule

from mor.training import MoRTrainer, training_arguments
from mor.training.optim import parameter_groups

from .models.conftest import small_model
from .models.test_generation import prompts


def aux_parameters(model):
    return {id(p) for n, p in model.named_parameters() if "aux_routers" in n}


def test_groups_hold_every_trained_parameter_once():
    model = small_model(router_aux="router", recursion_encoding=True)
    model.model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.2, 1e-2)
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trained)
    matrices, vectors, aux = groups
    assert {id(p) for p in aux["params"]} == aux_parameters(model)
    assert aux["lr"] == 1e-2
    assert "lr" not in matrices
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert any(p is model.model.recursion_encoding for p in vectors["params"])
    assert all(p.dim() == 2 for p in matrices["params"])
    together = parameter_groups(model)
    assert len(together) == 2
    assert {id(p) for p in together[0]["params"]} >= aux_parameters(model)


def test_a_rate_for_routers_that_are_not_there():
    with pytest.raises(ValueError, match="needs a model with auxiliary routers"):
        parameter_groups(small_model(router_aux="loss"), aux_router_learning_rate=1e-3)


def test_the_rest_of_the_model_does_not_learn_from_the_auxiliary_router():
    """What lets one optimizer with a group stand for two optimizers."""
    model = small_model(router_aux="router", router_aux_coef=1.0).train()
    tokens = prompts(2, 16)
    model(tokens, labels=tokens).aux_loss.backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == aux_parameters(model)


def test_the_trainer_gives_auxiliary_routers_their_own_rate(tmp_path):
    tokens = prompts(1, 16)[0]
    data = [{"input_ids": tokens, "labels": tokens}] * 4
    moved = {}
    for rate in (None, 0.0):
        model = small_model(router_aux="router")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        arguments = training_arguments(
            tmp_path, steps=2, batch_size=2, eval_every=0, save_every=0, disable_tqdm=True
        )
        trainer = MoRTrainer(model, arguments, train_dataset=data, aux_router_learning_rate=rate)
        trainer.create_optimizer()
        trainer.lr_scheduler = get_constant_schedule(trainer.optimizer)
        trainer.train()
        moved[rate] = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    aux = {n for n, _ in model.named_parameters() if "aux_routers" in n}
    assert aux <= moved[None]
    assert moved[0.0] == moved[None] - aux
