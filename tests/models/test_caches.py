"""Caches: chunks with pads and holes, cropping, gradients, inference mode, foreign caches."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .conftest import MODELS, small_llama, small_model, small_swapped
from .test_generation import padded, prompts


def alone(model, tokens, mask):
    """Logits of each row without its pads."""
    return [
        model(row[valid.bool()][None], use_cache=False).logits[0]
        for row, valid in zip(tokens, mask, strict=True)
    ]


def check_chunks(model, tokens, mask, sizes, whole_mask=True, atol=1e-4):
    """A batch given in chunks, pads among them, gives every row the logits it has alone."""
    cache, start, parts = DynamicCache(config=model.config), 0, []
    with torch.no_grad():
        for size in sizes:
            end = start + size
            given = mask[:, :end] if whole_mask else mask[:, start:end]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            out = model(
                tokens[:, start:end],
                attention_mask=given,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(out.logits)
            start = end
        logits = torch.cat(parts, dim=1)
        for row, want in enumerate(alone(model, tokens, mask)):
            torch.testing.assert_close(logits[row][mask[row].bool()], want, atol=atol, rtol=0)
    return cache, logits


MASKS = {
    "left": [[1] * 10, [0] * 7 + [1] * 3],
    "left-chunk-of-pads": [[0] * 4 + [1] * 6, [0] * 5 + [1] * 5],
    "right": [[1] * 10, [1] * 3 + [0] * 7],
    "right-chunk-of-pads": [[1] * 5 + [0] * 5, [1] * 4 + [0] * 6],
    "holes": [[1, 1, 0, 0, 0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0, 0, 1, 0, 1]],
}


@pytest.mark.parametrize("mask", MASKS)
def test_chunks_with_pads_continue_each_row_from_its_own_tokens(make, mask):
    """A row continued from another row's state where a chunk ended in pads, or had only pads."""
    model, mask = make().eval(), torch.tensor(MASKS[mask])
    tokens = prompts(2, 10) * mask
    check_chunks(model, tokens, mask, [3, 1, 4, 2])


@pytest.mark.parametrize("kind", ["expert", "hybrid"])
@pytest.mark.parametrize("mask", MASKS)
def test_pads_show_the_last_token_of_earlier_chunks(kind, mask):
    """So the last column of a finished row keeps its logits, whatever the chunks."""
    model, mask = MODELS[kind]().eval(), torch.tensor(MASKS[mask])
    tokens = prompts(2, 10) * mask
    _, logits = check_chunks(model, tokens, mask, [4, 4, 2], whole_mask=False)
    with torch.no_grad():
        for row, want in enumerate(alone(model, tokens, mask)):
            torch.testing.assert_close(logits[row, -1], want[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["expert", "hybrid", "swap-expert"])
def test_a_prompt_in_chunks_generates_what_it_does_whole(kind, side):
    if kind.startswith("swap") and side == "right":
        pytest.skip("Transformers' own layers do not promise right padding")
    model = MODELS[kind]().eval()
    tokens, mask = padded([11, 3, 8], side)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **options), want)


@pytest.mark.parametrize(
    ("mask", "removed"), [("right", 3), ("right-chunk-of-pads", 5), ("holes", 2)]
)
def test_cropping_removes_columns_not_tokens(make, mask, removed):
    """Rows that ended in pads lost as many tokens as others lost columns."""
    model, mask = make().eval(), torch.tensor(MASKS[mask])
    tokens = prompts(2, 10) * mask
    cache, _ = check_chunks(model, tokens, mask, [4, 6])
    cache.crop(-removed)
    assert cache.get_seq_length() == 10 - removed
    kept = 10 - removed
    mask = torch.cat([mask[:, :kept], torch.ones(2, 3, dtype=torch.int64)], dim=1)
    tokens = torch.cat([tokens[:, :kept], prompts(2, 3, seed=1)], dim=1)
    with torch.no_grad():
        got = model(
            tokens[:, kept:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, kept:],
            past_key_values=cache,
        ).logits
        for row, want in enumerate(alone(model, tokens, mask)):
            torch.testing.assert_close(got[row], want[-3:], atol=1e-4, rtol=0)


def test_sequences_of_a_cache_are_reordered_with_all_they_have():
    model, mask = small_model(router="token").eval(), torch.tensor(MASKS["right"])
    tokens = prompts(2, 10) * mask
    cache, logits = check_chunks(model, tokens, mask, [4, 6])
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    pads = torch.zeros(3, 1, dtype=torch.int64)
    pads[2] = 1
    with torch.no_grad():
        shown = model(prompts(3, 1), attention_mask=pads, past_key_values=cache).logits[:, 0]
    for row in range(2):
        torch.testing.assert_close(shown[row], logits[1, -1])


@pytest.mark.parametrize("calls", [[6, 6], [6, 1, 1, 4]], ids=["two", "four"])
def test_gradients_go_through_a_cache(make, calls):
    """Keys were overwritten that the graph of an earlier call still needed."""
    model, tokens = make().eval(), prompts(2, 12)
    model(tokens, use_cache=False).logits.square().mean().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    cache = DynamicCache(config=model.config)
    parts = [model(t, past_key_values=cache).logits for t in tokens.split(calls, dim=1)]
    torch.cat(parts, dim=1).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in want and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], atol=1e-5, rtol=1e-3)
        else:
            assert name not in want or not want[name].any()


def test_gradients_after_a_prompt_without(make):
    """A completion's gradients, of a prompt that was cached under no_grad; and the prompt stays."""
    model, tokens = make().eval().double(), prompts(2, 12)
    prompt = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=prompt)
    grads = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(tokens[:, 6:], past_key_values=copy.deepcopy(prompt)).logits.sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_caches_of_inference_mode_go_on_outside_it(make):
    model, tokens = make().eval(), prompts(2, 10)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits[:, 5:]
    for change in (None, "crop", "copy", "grad"):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(tokens[:, : 7 if change == "crop" else 5], past_key_values=cache)
        if change == "crop":
            cache.crop(-2)
        if change == "copy":
            cache = copy.deepcopy(cache)
        with torch.set_grad_enabled(change == "grad"):
            got = [model(t, past_key_values=cache).logits for t in tokens[:, 5:].split([2, 3], 1)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["expert", "swap-expert", "swap-one"])
def test_caches_of_another_kind_are_refused(kind):
    """A swapped model ignored a static cache's empty slots: its logits were off by 7."""
    model, tokens = MODELS[kind]().eval(), prompts(2, 6)
    static = StaticCache(config=small_llama().config, max_cache_len=20)
    for cache in (static, DynamicCache()):
        with pytest.raises(ValueError, match=r"expected (past_key_values = )?DynamicCache\(config"):
            model(tokens, past_key_values=cache)
    for option in ("static", "offloaded", "quantized", "offloaded_static"):
        with pytest.raises(ValueError, match=f"cache_implementation='{option}'"):
            model.generate(tokens, cache_implementation=option, max_new_tokens=2)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(tokens, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["expert", "shared", "swap-expert"])
def test_several_turns_on_one_cache(kind):
    model, tokens = MODELS[kind]().eval(), prompts(1, 6)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 4, "do_sample": False}
    for turn in range(3):
        got = model.generate(tokens, past_key_values=cache, **options)
        assert torch.equal(got, model.generate(tokens, **options))
        tokens = torch.cat([got, prompts(1, 3, seed=turn)], dim=1)


def test_other_layers_masks_reach_a_swapped_model_in_a_cached_batch():
    """The attention implementation of the dense layers decides what becomes of the mask."""
    mask = torch.tensor(MASKS["left"])
    tokens = prompts(2, 10) * mask
    for implementation in ("eager", "sdpa"):
        model = small_swapped().eval()
        model.set_attn_implementation(implementation)
        check_chunks(model, tokens, mask, [4, 6])
