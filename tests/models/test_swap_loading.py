"""A swapped model keeps its mode and dtype, and comes back with all it was saved with."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import mor
from mor.models.swap.routed_layers import RoutedLayers

from .conftest import small_llama, small_swapped
from .test_generation import prompts


def logits(model, tokens=None):
    with torch.no_grad():
        return model(prompts(2, 8) if tokens is None else tokens, use_cache=False).logits


@pytest.mark.parametrize("training", [False, True])
def test_swap_keeps_the_mode(training):
    """The routed part of a model in evaluation trained, and looked at later tokens."""
    model = mor.swap(small_llama().train(training), (1, 7), 3)
    assert {m.training for m in model.modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("balancing", ["loss_free", "loss"])
def test_swap_keeps_the_dtype(dtype, balancing, tmp_path):
    dense = small_llama().to(dtype)
    model = mor.swap(dense, (1, 7), 3, "token", balancing=balancing).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    if balancing == "loss_free":
        assert model.model.layers[1].recursion.bias.dtype == torch.float32
    out = model.generate(prompts(1, 5), max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    if balancing == "loss_free":
        assert loaded.model.layers[1].recursion.bias.dtype == torch.float32
    assert torch.equal(loaded.generate(prompts(1, 5), max_new_tokens=3, do_sample=False), out)


def test_generation_settings_come_back(tmp_path):
    """Second stop tokens of chat models stand in generation_config.json alone."""
    model = small_swapped().eval()
    first = int(logits(model, prompts(1, 6))[0, -1].argmax())
    model.generation_config.eos_token_id = [2, first]
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    assert loaded.generation_config.eos_token_id == [2, first]
    assert loaded.generation_config.repetition_penalty == 1.3
    out = loaded.generate(prompts(1, 6), max_new_tokens=5, do_sample=False, repetition_penalty=1.0)
    assert out.shape[1] == 7


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_options_of_from_pretrained_are_used(options, tmp_path):
    model = small_swapped().eval()
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path, **options)
    assert not any(m.training for m in loaded.modules())
    if "dtype" in options:
        assert loaded.dtype == torch.bfloat16
        return
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    if "attn_implementation" in options:
        assert loaded.config._attn_implementation == "eager"


def test_loading_says_what_it_found(tmp_path):
    small_swapped().save_pretrained(tmp_path)
    _, found = mor.load_swapped(tmp_path, output_loading_info=True)
    assert not any(found.values())


@pytest.mark.parametrize("kind", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_nothing_takes_a_swapped_checkpoint_for_a_dense_one(kind, tmp_path):
    """It was loaded as a dense model, its routed layers new."""
    small_swapped().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mor_swap"):
        kind.from_pretrained(tmp_path)


def test_a_dense_configuration_of_the_file_has_its_sizes(tmp_path):
    """Transformers took the settings of the swap for it: a model of 27 GB was built."""
    small_swapped().save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.hidden_size == 64
    assert config.mor_swap["num_recursions"] == 3


def test_checkpoints_of_subfolders_are_read_there(tmp_path):
    """What says where the files are was used for the configuration alone."""
    model = small_swapped().eval()
    model.save_pretrained(tmp_path / "sub")
    loaded = mor.load_swapped(tmp_path, subfolder="sub")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_the_class_of_a_swapped_model_loads_its_checkpoints(tmp_path):
    """As trainers do: `type(model).from_pretrained(folder)`."""
    model = small_swapped().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model))
    small_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no swapped model"):
        type(model).from_pretrained(tmp_path)


def test_a_swapped_model_that_is_loaded_saves_again(tmp_path):
    model = small_swapped(layers=3).eval()
    model.save_pretrained(tmp_path / "first")
    loaded = mor.load_swapped(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert loaded.config.model_type == "llama"
    torch.testing.assert_close(logits(mor.load_swapped(tmp_path / "second")), logits(model))


def test_a_model_on_the_meta_device_is_swapped_and_filled():
    with torch.device("meta"):
        model = small_swapped()
    assert all(p.is_meta for p in model.parameters())
    want = small_swapped().eval()
    model.to_empty(device="cpu").load_state_dict(want.state_dict())
    model.model.rotary_emb = want.model.rotary_emb
    assert isinstance(model.model.layers[1], RoutedLayers)
    torch.testing.assert_close(logits(model.eval()), logits(want))


def test_a_training_run_of_a_swapped_model_goes_on(tmp_path):
    """The Trainer saves, picks the best checkpoint, and resumes."""
    rows = [{"input_ids": t, "labels": t} for t in prompts(8, 12)]
    options = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none",
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    losses = []
    for steps, resume in ((2, False), (3, True)):
        arguments = TrainingArguments(tmp_path, max_steps=steps, **options)
        trainer = Trainer(
            small_swapped(capacity_warmup_steps=9), arguments, train_dataset=rows, eval_dataset=rows
        )
        trainer.train(resume_from_checkpoint=resume)
        losses.append(trainer.state.log_history)
        assert trainer.model.model.layers[1].recursion.warmup_step > 0
    trainer.save_model(tmp_path / "final")
    loaded = mor.load_swapped(tmp_path / "final")
    torch.testing.assert_close(logits(loaded), logits(trainer.model.eval()))


@pytest.mark.parametrize("system", ["vision_model", "../pmod", "pmod.os", "nothing", 3])
def test_a_configuration_named_modules_that_the_loader_had_a_list_of(tmp_path, system):
    """Any system of mor loads without being known to the loader, and nothing else is imported."""
    mor.swap(small_llama(), (1, 7), num_recursions=3).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["mor_swap"]["system"] = system
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="load_swapped: expected a model that a system of mor"):
        mor.load_swapped(tmp_path)
