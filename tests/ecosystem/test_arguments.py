"""Caches, masks and keyword arguments of other tools: used, or refused by name."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .conftest import random_tokens, tiny_model
from .test_trl import swapped_model

TOKENS = random_tokens(2, 12)


@pytest.fixture(params=["mor", "swap"])
def model(request: pytest.FixtureRequest):
    return (tiny_model() if request.param == "mor" else swapped_model()).eval()


def bool_mask(rows: int, length: int) -> torch.Tensor:
    return torch.ones(length, length).tril().bool().expand(rows, 1, -1, -1)


def static_cache(model) -> StaticCache:
    return StaticCache(config=getattr(model.config, "base_config", model.config), max_cache_len=32)


REFUSED = {
    "4-D mask": lambda m: m(TOKENS, attention_mask=bool_mask(2, 12)),
    "StaticCache": lambda m: m(TOKENS, past_key_values=static_cache(m)),
    "cache_implementation": lambda m: m.generate(
        TOKENS, max_new_tokens=2, cache_implementation="static"
    ),
    "output_attentions": lambda m: m(TOKENS, output_attentions=True),
    "assistant_early_exit": lambda m: m.generate(
        TOKENS[:1], max_new_tokens=2, assistant_early_exit=2
    ),
}

SENTENCES = {
    "4-D mask": r"attention_mask: expected",
    "StaticCache": r"past_key_values",
    "cache_implementation": r"cache_implementation='static'",
    "output_attentions": r"output_attentions: depth_attention keeps no weights",
    "assistant_early_exit": r"assistant_early_exit=2 is not supported",
}


@pytest.mark.parametrize("name", REFUSED)
def test_swallowed_or_wrong_now_refused_by_name(model, name):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=SENTENCES[name]):
        REFUSED[name](model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    "how", ["prompt_lookup_num_tokens", "assistant_model", "prefill_chunk_size"]
)
def test_other_ways_of_decoding_give_the_same_tokens(model, how):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = TOKENS[:1]
    value = {
        "prompt_lookup_num_tokens": 3,
        "assistant_model": tiny_model(seed=1, router=None).eval(),
        "prefill_chunk_size": 5,
    }[how]
    want = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options, **{how: value}), want)


def test_shift_labels_are_the_targets_as_they_are(model):
    shifted = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], dim=1)
    want = model(TOKENS, labels=TOKENS).lm_loss
    got = model(TOKENS, labels=TOKENS, shift_labels=shifted).lm_loss
    torch.testing.assert_close(got, want)


def test_crop_takes_back_the_last_tokens(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(TOKENS[:, :8]).logits[:, -1]
        model(TOKENS, past_key_values=cache, use_cache=True)
        cache.crop(-5)
        got = model(TOKENS[:, 7:8], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_documents_by_positions_and_by_mask(model):
    rows = torch.cat([TOKENS[:1], TOKENS[1:]], dim=1)
    positions = torch.arange(12).repeat(2).unsqueeze(0)
    with torch.no_grad():
        alone = model(TOKENS[1:]).logits
        packed = model(rows, position_ids=positions, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_generation_in_training_mode_is_that_of_evaluation(model):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(TOKENS, **options)
    assert torch.equal(model.train().generate(TOKENS, **options), want)
    assert model.training


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="no_such_argument"):
        tiny_model()(TOKENS, no_such_argument=torch.ones(2))
