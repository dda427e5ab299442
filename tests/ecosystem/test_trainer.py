"""transformers.Trainer, unchanged; `MoRTrainer` and its logs are in tests/test_training.py."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import find_labels

from mor import MoRForCausalLM
from mor.training import MoRTrainer

from .conftest import ROUTING, random_tokens, tiny_model


def train(model, rows, folder, batch_size, accumulation, **options) -> Trainer:
    """One optimizer step of plain gradient descent: weights move by the negative gradient."""
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    return trainer


def dataset(tokens: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


@pytest.mark.parametrize("name", [*ROUTING, "loss_free"])
def test_accumulation_equals_one_batch(name, tmp_path):
    """Two micro-batches of two rows give the gradient of one batch of four, every loss included.

    Both micro-batches are alike, because the balancing loss is a product of two means over its
    batch: of two different halves it would differ in value, though not in weight.
    """
    options = {"router": "token", "router_balancing": "loss_free"}
    options = ROUTING.get(name, options) | {"router_aux_coef": 1.0}
    tokens = random_tokens(2, 12).repeat(2, 1)
    labels = tokens.clone()
    labels[1::2, :7] = -100  # unequal numbers of targets
    moved, losses = [], []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = tiny_model(**options)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        folder = tmp_path / str(batch_size)
        trainer = train(model, dataset(tokens, labels), folder, batch_size, accumulation)
        moved.append({n: before[n] - p.detach() for n, p in model.named_parameters()})
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for parameter, gradient in moved[0].items():
        torch.testing.assert_close(moved[1][parameter], gradient, atol=2e-7, rtol=1e-5)
        if options["router"] is not None:
            assert gradient.any(), parameter


def test_lm_loss_is_exact_for_unequal_micro_batches(tmp_path):
    """One micro-batch with many targets, one with few: each target weighs the same."""
    tokens = random_tokens(4, 12)
    labels = tokens.clone()
    labels[2:, :9] = -100
    moved = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = tiny_model(router=None)
        before = model.lm_head.weight.detach().clone()
        folder = tmp_path / str(batch_size)
        train(model, dataset(tokens, labels), folder, batch_size, accumulation)
        moved.append(before - model.lm_head.weight.detach())
    torch.testing.assert_close(moved[1], moved[0], atol=2e-7, rtol=1e-5)


def test_saves_evaluates_and_checkpoints_gradients(routing, tmp_path):
    rows = dataset(*[random_tokens(4, 12)] * 2)
    options = {"gradient_checkpointing": True, "eval_strategy": "no"}
    model = tiny_model(**routing)
    trainer = train(model, rows, tmp_path, 4, 1, **options)
    plain = tiny_model(**routing)
    train(plain, rows, tmp_path, 4, 1)
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)
    metrics = trainer.evaluate(rows)
    trainer.save_model(tmp_path / "model")
    loaded = MoRForCausalLM.from_pretrained(tmp_path / "model").eval()
    inputs = torch.stack([row["input_ids"] for row in rows])
    output = loaded(inputs, labels=inputs)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def smoothed(logits: torch.Tensor, tokens: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Smoothed cross-entropy of the next tokens."""
    log = logits[:, :-1].log_softmax(-1)
    picked = log.gather(2, tokens[:, 1:, None]).mean()
    return -(1 - epsilon) * picked - epsilon * log.mean()


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
@pytest.mark.parametrize("kind", [Trainer, MoRTrainer])
def test_losses_of_ones_own_saw_unshifted_labels(kind, how, tmp_path):
    """The Trainer keeps the labels to itself; router losses are MoRTrainer's to add."""
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return smoothed(outputs.logits, labels, 0.1)

    smoothing = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    own = {} if smoothing else {"compute_loss_func": own_loss}
    model, tokens = tiny_model(router_aux_coef=1.0), random_tokens(2, 12)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], **smoothing)
    trainer = kind(model, arguments, **own)
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    output = model(tokens)
    want = smoothed(output.logits, tokens, 0.1)
    if kind is MoRTrainer:
        want = want + output.router_loss
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert len(seen) == len(own)


@pytest.mark.parametrize("name", ROUTING)
@pytest.mark.parametrize("kind", [Trainer, MoRTrainer])
def test_step_without_targets_made_every_weight_nan(kind, name, tmp_path):
    tokens = random_tokens(2, 12)
    rows = dataset(tokens, torch.full_like(tokens, -100))
    model = tiny_model(**ROUTING[name])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = kind(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_evaluation_lost_its_loss_by_an_argument_named_like_labels():
    # The Trainer computes it on batches that have all of these.
    assert find_labels(MoRForCausalLM) == ["labels"]


def test_shifted_labels_give_the_loss_of_labels():
    model, tokens = tiny_model(router="token"), random_tokens(2, 12)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    want = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, want)
