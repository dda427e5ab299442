"""Arguments, options and losses that were dropped without a word."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

import mor
from mor.training import MoRTrainer

from .conftest import MODELS, small_llama, small_swapped
from .test_generation import prompts


def make(kind):
    return MODELS[kind]()


def swapped():
    return small_swapped().eval()


@torch.no_grad()
def test_swapped_models_swallowed_arguments():
    tokens = prompts(1, 16)
    for name, value in (
        ("foo", 3),
        ("encoder_hidden_states", torch.ones(1)),
        ("cu_seq_lens_q", torch.tensor([0, 8, 16], dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match=f"swap: no use for the argument '{name}'"):
            swapped()(tokens, **{name: value})
    swapped()(tokens, foo=None)


def test_shifted_labels_alone_gave_a_swapped_model_no_loss():
    model, tokens = swapped(), prompts(2, 12)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    want = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, want)


def test_a_swapped_model_was_uploaded_without_its_options(tmp_path, monkeypatch):
    seen = []
    model = swapped()
    monkeypatch.setattr(
        type(model), "push_to_hub", lambda self, name, **options: seen.append((name, options))
    )
    model.save_pretrained(tmp_path, True, push_to_hub=True, repo_id="x/y", private=True, token="T")
    assert seen == [("x/y", {"private": True, "token": "T"})]


def test_a_swapped_model_named_its_dense_model_as_reference(tmp_path):
    """Trainers load the path that a configuration names as the reference model."""
    small_llama().save_pretrained(tmp_path)
    model = mor.swap(AutoModelForCausalLM.from_pretrained(tmp_path), (1, 7), 3)
    assert model.config._name_or_path == ""


@pytest.mark.parametrize("kind", ["expert", "swap-expert"])
def test_router_losses_beside_label_smoothing_were_lost_in_silence(kind, tmp_path):
    transformers_logging.warning_once.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = transformers_logging.get_logger("mor")
    logger.addHandler(handler)
    try:
        tokens = prompts(2, 12)
        rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
        for trainer, said in ((MoRTrainer, False), (Trainer, True)):
            arguments = TrainingArguments(
                tmp_path, max_steps=1, label_smoothing_factor=0.1, use_cpu=True, report_to=[]
            )
            trainer(make(kind).train(), arguments, train_dataset=rows).train()
            assert any("MoRTrainer" in line for line in lines) is said
    finally:
        logger.removeHandler(handler)


def test_trainer_of_a_model_that_returns_tuples(tmp_path):
    model, tokens = make("expert").train(), prompts(2, 12)
    model.config.return_dict = False
    trainer = MoRTrainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    torch.testing.assert_close(loss, model(tokens, labels=tokens, return_dict=True).loss)


@torch.no_grad()
def test_a_row_of_pads_after_a_crop_showed_zeros():
    model, tokens = make("expert").eval(), prompts(2, 8)
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    cache.crop(-2)
    mask = torch.cat([torch.ones(2, 6), torch.tensor([[1.0], [0.0]])], 1)
    with pytest.raises(ValueError, match="a token in every row after a crop"):
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("kind", ["expert", "swap-expert"])
def test_offloading_of_a_cache_was_not_done(kind):
    model = make(kind).eval()
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(ValueError, match="offloading"):
        model(prompts(1, 4), past_key_values=cache)


@torch.no_grad()
def test_a_cache_kept_the_states_of_the_whole_prompt():
    model = make("expert").eval()
    cache = model(prompts(1, 16), use_cache=True).past_key_values
    states = cache.layers[0].last_states
    assert states.untyped_storage().nbytes() == states.numel() * states.element_size()
