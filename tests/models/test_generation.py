"""Cached generation equals the full forward: any batch, padding and mix of depths."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from mor.analysis import flops_breakdown

from .conftest import small_model


def prompts(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def generate_greedily(
    model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None, steps: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [B, S + steps] of cached greedy generation and the logits [B, steps, V] behind."""
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens) if mask is None else mask,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of the given lengths, padded with token 0 on one side, and the mask."""
    longest = max(lengths)
    tokens = prompts(len(lengths), longest)
    mask = torch.zeros_like(tokens)
    for row, n in enumerate(lengths):
        mask[row, longest - n :] = 1 if side == "left" else mask[row, longest - n :]
        if side == "right":
            mask[row, :n] = 1
    return tokens * mask, mask


#: Where the pads of a batch stand; a prompt alone has none.
ONE_AND_BATCHES = pytest.mark.parametrize(
    ("lengths", "side"),
    [([9], "left"), ([7, 12, 1, 9, 5], "left"), ([7, 12, 1, 9, 5], "right")],
    ids=["one", "batch-left", "batch-right"],
)


@ONE_AND_BATCHES
def test_cached_generation_equals_full_forward(variant, lengths, side):
    model = small_model(**variant).eval()
    tokens, mask = padded(lengths, side)
    steps = 10
    sequences, logits = generate_greedily(model, tokens, mask, steps=steps)
    new = sequences[:, tokens.shape[1] :]
    for row in range(len(lengths)):
        prompt = tokens[row][mask[row] == 1]
        whole = torch.cat([prompt, new[row]]).unsqueeze(0)
        with torch.no_grad():
            full = model(whole).logits[0, len(prompt) - 1 : -1]
        cached = logits[row]
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=0)
        assert torch.equal(full.argmax(-1), new[row])


def test_prefill_in_pieces_equals_full_forward(variant):
    model = small_model(**variant).eval()
    tokens = prompts(2, 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        full = model(tokens).logits
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits
            for piece in tokens.split([7, 1, 1, 11], dim=1)
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-4, rtol=0)


@ONE_AND_BATCHES
def test_sampling_with_a_seed_does_not_depend_on_the_cache(variant, lengths, side):
    model = small_model(**variant).eval()
    tokens, mask = padded(lengths, side)
    torch.manual_seed(3)
    alone = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    uncached = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=True,
        use_cache=False,
    )
    assert torch.equal(alone, uncached)


@ONE_AND_BATCHES
def test_beam_search_equals_uncached(variant, lengths, side):
    model = small_model(**variant).eval()
    tokens, mask = padded(lengths, side)
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options)
    )


def test_enough_beams_find_the_best_of_all_continuations(variant):
    """Five tokens, three steps and 5 * 5 beams: none of the 125 continuations is dropped early."""
    model = small_model(vocab_size=5, **variant).eval()
    lengths = [3, 5]
    tokens, mask = padded(lengths, "left")
    tokens = tokens % 5
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=3,
        num_beams=25,
        num_return_sequences=5,
        length_penalty=0.0,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = out.sequences[:, tokens.shape[1] :].unflatten(0, (2, 5))
    continuations = torch.cartesian_prod(*[torch.arange(5)] * 3)
    for row, length in enumerate(lengths):
        prompt = tokens[row][mask[row] == 1].expand(125, length)
        with torch.no_grad():
            logits = model(torch.cat([prompt, continuations], 1), use_cache=False).logits
        steps = logits[:, length - 1 : -1].log_softmax(-1)
        total = steps.gather(2, continuations.unsqueeze(2)).sum((1, 2))
        best = total.topk(5)
        assert torch.equal(found[row], continuations[best.indices])
        scores = out.sequences_scores.unflatten(0, (2, 5))[row]
        torch.testing.assert_close(scores, best.values, atol=1e-4, rtol=0)


def test_assisted_generation_equals_greedy(variant):
    model = small_model(**variant).eval()
    assistant = small_model(seed=1, **variant).eval()
    tokens = prompts(1, 6)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        model.generate(tokens, assistant_model=assistant, **options),
        model.generate(tokens, **options),
    )


def test_assisted_generation_of_a_batch_is_refused():
    model, assistant = (small_model(seed=seed).eval() for seed in (0, 1))
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(prompts(2, 6), assistant_model=assistant, max_new_tokens=4, do_sample=False)


def test_a_token_that_left_takes_no_cache_slot():
    model = small_model(router="token").eval()
    tokens = prompts(1, 30)
    out = model(tokens, use_cache=True)
    depths = out.token_depths[0]
    lengths = [int(layer.lengths[0]) for layer in out.past_key_values.layers]
    active = [int((depths > step).sum()) for step in range(3)]
    assert lengths == [30, *[n for n in active for _ in range(2)], 30]
    assert active[1] < 30


def test_foreign_cache_and_generate_batch_are_refused():
    model = small_model().eval()
    with pytest.raises(ValueError, match="past_key_values: expected DynamicCache"):
        model(prompts(1, 4), past_key_values=DynamicCache())
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3]])


def test_cache_refuses_another_batch_size():
    model = small_model().eval()
    cache = model(prompts(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expected 2 sequences, got 3"):
        model(prompts(3, 1), past_key_values=cache)


def with_depths(model: torch.nn.Module, depth: int) -> torch.nn.Module:
    """The model, whose router sends every token through the same number of recursions."""
    recursion = model.model.recursion
    for step, router in enumerate(getattr(recursion, "routers", None) or [recursion.router]):
        logits = torch.full((3,), -50.0)
        logits[depth - 1] = 50.0
        if hasattr(recursion, "routers"):
            logits = torch.tensor([50.0 if step < depth else -50.0])
        # The router's product stays, so that it is counted; its result is a constant.
        router.register_forward_hook(lambda module, args, out, to=logits: 0 * out + to)
    return model


@pytest.fixture(params=[1, 2, 3], ids=lambda depth: f"depth{depth}")
def exiting(request, variant) -> tuple[torch.nn.Module, int]:
    """A model all of whose tokens exit after the same recursion, and that recursion's number."""
    if variant.get("router") is None or "router_aux" in variant:
        pytest.skip("no single router decides")
    return with_depths(small_model(**variant).eval(), request.param), request.param


def count_layer_calls(model: torch.nn.Module) -> list[int]:
    """A list that grows by one for each call of a decoder layer from now on."""
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *args, index=index: calls.append(index))
    return calls


def test_a_recursion_that_no_token_takes_runs_no_layer(exiting):
    model, depth = exiting
    tokens = prompts(2, 5)
    expected = model.config.num_hidden_layers - (3 - depth) * model.config.block_depth
    calls = count_layer_calls(model)
    with torch.no_grad():
        output = model(tokens)
    assert output.token_depths.unique().tolist() == [depth]
    assert len(calls) == expected
    calls.clear()
    model(tokens)  # with gradients every process runs every layer
    assert len(calls) == model.config.num_hidden_layers


def test_steps_without_tokens_are_decoded_as_in_the_full_forward(exiting):
    """Greedy, in a padded batch, after a crop and from a reused prompt; and beams."""
    model, _ = exiting
    tokens, mask = padded([7, 3, 6], "left")
    sequences, logits = generate_greedily(model, tokens, mask, steps=5)
    for row, n in enumerate([7, 3, 6]):
        with torch.no_grad():
            full = model(sequences[row : row + 1, 7 - n :]).logits[0, n - 1 : -1]
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=0)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
        again = model(tokens[:, -2:], attention_mask=mask, past_key_values=cache).logits
        full = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(again, full[:, -2:], atol=1e-4, rtol=0)
    cache.crop(-1)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), sequences)
    beams = {**options, "num_beams": 3}
    assert torch.equal(
        model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams)
    )


def test_tokens_of_other_depths_follow_steps_without_tokens(variant):
    """What exits early leaves a cache that deeper tokens go on from."""
    if variant.get("router") is None or "router_aux" in variant:
        pytest.skip("no single router decides")
    model = small_model(**variant).eval()
    shallow = with_depths(small_model(**variant).eval(), 1)
    shallow.load_state_dict(model.state_dict())
    tokens = prompts(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for column in range(5):
            shallow(tokens[:, column : column + 1], past_key_values=cache)
        stepwise = [
            model(piece, past_key_values=cache).logits for piece in tokens[:, 5:].split(1, 1)
        ]
        other = DynamicCache(config=model.config)
        shallow(tokens[:, :5], past_key_values=other)
        at_once = model(tokens[:, 5:], past_key_values=other).logits
    torch.testing.assert_close(torch.cat(stepwise, 1), at_once, atol=1e-4, rtol=0)


def test_analysis_predicts_the_products_of_decoding(exiting):
    model, depth = exiting
    prompt, new = 6, 5
    tokens = prompts(1, prompt)
    shares = [1.0] * depth + [0.0] * (3 - depth)
    length = prompt + new - 1
    expected = flops_breakdown(model.config, length, shares)
    head = expected.pop("head") * new  # generation has logits of the last column alone
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(tokens, max_new_tokens=new, do_sample=False)
    assert counter.get_total_flops() == round(sum(expected.values()) * length + head)
