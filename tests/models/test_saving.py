"""What is saved is decided when it is saved: heads that were untied by hand or by PEFT."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mor
from mor import MoRForCausalLM

from .conftest import small_model, small_swapped
from .test_generation import prompts


def with_head(model):
    """A head of its own, whatever the configuration says."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1 * noise)
    return model


def untied(model):
    with_head(model).config.tie_word_embeddings = False
    return model


def resized(model):
    model.resize_token_embeddings(105, mean_resizing=False)
    return untied(model)


def trained_by_peft(model):
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=False,
    )
    tuned = get_peft_model(model, options).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        tuned(input_ids=prompts(2, 8), labels=prompts(2, 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = tuned.merge_and_unload()
    merged.config.tie_word_embeddings = False
    return merged


ROADS = {"untied": untied, "resized": resized, "peft": trained_by_peft}


def check_saved(model, load, folder, tokens=None):
    tokens = prompts(2, 8) if tokens is None else tokens
    with torch.no_grad():
        want = model.eval()(tokens, use_cache=False).logits
        model.save_pretrained(folder)
        for _ in range(2):
            got = load(folder).eval()(tokens, use_cache=False).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("made", [small_model, small_swapped])
def test_an_untied_head_is_saved(made, road, tmp_path):
    """It was left out of the file, and random after each load."""
    model = ROADS[road](made())
    load = MoRForCausalLM.from_pretrained if made is small_model else mor.load_swapped
    check_saved(model, load, tmp_path)


@pytest.mark.parametrize("made", [small_model, small_swapped])
def test_a_head_untied_beside_a_tied_configuration_is_no_accident(made, tmp_path):
    model = with_head(made())
    load = MoRForCausalLM.from_pretrained if made is small_model else mor.load_swapped
    check_saved(model, load, tmp_path)


@pytest.mark.parametrize("made", [small_model, small_swapped])
def test_a_tied_head_is_saved_once(made, tmp_path):
    from safetensors.torch import load_file

    model = made()
    load = MoRForCausalLM.from_pretrained if made is small_model else mor.load_swapped
    check_saved(model, load, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_shards_of_both_kinds_come_back(tmp_path):
    for name, made, load in (
        ("whole", small_model, MoRForCausalLM.from_pretrained),
        ("swapped", small_swapped, mor.load_swapped),
    ):
        folder = tmp_path / name
        model = made().eval()
        model.save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        with torch.no_grad():
            got = load(folder).eval()(prompts(2, 8)).logits
            assert torch.equal(got, model(prompts(2, 8)).logits)


def test_training_options_are_saved(tmp_path):
    model = small_model(train_routing="threshold", capacity_warmup_steps=3)
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.train_routing == "threshold"
    assert loaded.model.recursion.train_routing == "threshold"
    assert json.loads((tmp_path / "config.json").read_text())["train_routing"] == "threshold"


@pytest.mark.parametrize("made", [small_model, small_swapped])
def test_tokenizers_load_beside_a_model(made, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made().save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a b a").input_ids == [1, 2, 1]
