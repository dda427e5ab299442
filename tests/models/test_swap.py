"""A range of layers of a loaded model becomes a Mixture-of-Recursions block."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import mor
from mor.models.swap.routed_layers import RoutedLayers
from mor.modules import RouterScore

from .conftest import check_causal_evaluation, small_model
from .test_conversion import dense_models
from .test_generation import generate_greedily, padded, prompts


def swapped(name="llama", **options):
    return mor.swap(dense_models()[name], (1, 7), **{"num_recursions": 3, **options})


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_gate_one_and_full_capacity_keep_the_model(name):
    """With one recursion of everything and H + (f(H) - H) the model is what it was."""
    dense = dense_models()[name].eval()
    tokens = prompts(2, 14)
    with torch.no_grad():
        want = dense(tokens).logits
    model = mor.swap(dense, range(1, 7), 1, capacities=[1.0]).eval()
    recursion = model.model.layers[1].recursion
    original = type(recursion).forward

    def replaced(self, hidden, packing, block, keep_states=False, generating=False):
        out = original(self, hidden, packing, block, keep_states, generating)
        rows = torch.arange(hidden.shape[0])
        out.hidden = block(hidden, packing, 0, rows)
        return out

    recursion.forward = replaced.__get__(recursion)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, use_cache=False).logits, want, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_cached_generation_equals_full_forward(name, router):
    model = swapped(name, router=router).eval()
    assert [type(layer) is RoutedLayers for layer in model.model.layers] == [False, True, False]
    tokens, mask = padded([5, 9, 2], "left")
    sequences, logits = generate_greedily(model, tokens, mask)
    for row, n in enumerate([5, 9, 2]):
        whole = sequences[row : row + 1, tokens.shape[1] - n :]
        with torch.no_grad():
            full = model(whole, use_cache=False).logits[0, n - 1 : -1]
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [(1, 7), 3], ids=["range", "one"])
@pytest.mark.parametrize("router", ["expert", "token"])
def test_evaluation_is_causal(router, layers, exactness):
    model = mor.swap(dense_models()["llama"], layers, num_recursions=3, router=router)
    routed = next(m for m in model.modules() if isinstance(m, RoutedLayers))
    check_causal_evaluation(
        model,
        prompts(2, 16),
        (1, 7, 15),
        exactness,
        depths_of=lambda _: routed.routing.depths.reshape(2, 16),
    )


@pytest.mark.parametrize("router", ["expert", "token"])
def test_it_trains_and_the_router_learns(router, tmp_path):
    model = swapped(router=router)
    tokens = prompts(8, 16)
    rows = [{"input_ids": t, "labels": t} for t in tokens]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, report_to="none", logging_steps=1, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before)
    output = model.train()(tokens, labels=tokens)
    routing = model.model.layers[1].routing
    extra = 0.001 * routing.aux_loss if router == "expert" else 0.1 * routing.balancing_loss
    lm = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, lm + extra)


@pytest.mark.parametrize("router", ["expert", "token"])
def test_saved_and_loaded(router, tmp_path):
    model = swapped(router=router).eval()
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    assert not loaded.training, "as from_pretrained of Transformers"
    tokens = prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("router", ["expert", "token"])
def test_one_layer_is_used_again_and_again(router, tmp_path):
    model = mor.swap(dense_models()["llama"], 3, num_recursions=3, router=router).eval()
    assert [type(layer) is RoutedLayers for layer in model.model.layers].index(True) == 3
    assert len(model.model.layers) == 8
    tokens, mask = padded([5, 9, 2], "left")
    sequences, logits = generate_greedily(model, tokens, mask)
    depths = model.model.layers[3].routing.depths
    for row, n in enumerate([5, 9, 2]):
        whole = sequences[row : row + 1, tokens.shape[1] - n :]
        with torch.no_grad():
            full = model(whole, use_cache=False).logits[0, n - 1 : -1]
        depths = torch.cat([depths, model.model.layers[3].routing.depths])
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=0)
    assert depths.unique().numel() > 1  # tokens really differ
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_scores_are_saved_too(tmp_path):
    model = swapped(score=RouterScore("tanh", 0.3)).eval()
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    assert loaded.model.layers[1].recursion.score == RouterScore("tanh", 0.3)


def test_packed_documents_do_not_see_each_other():
    model = swapped(router="token").eval()
    lengths = [5, 1, 9]
    tokens = prompts(1, 15)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits[0]
        alone = [model(t, use_cache=False).logits[0] for t in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="need use_cache=False"):
        model(tokens, position_ids=positions)


def test_a_cropped_cache_goes_on():
    model = swapped().eval()
    tokens = prompts(1, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.crop(-4)
        again = model(tokens[:, 8:], past_key_values=cache).logits
        full = model(tokens, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(again, full, atol=1e-4, rtol=0)


def test_z_loss_is_part_of_the_loss():
    tokens = prompts(2, 12)
    losses = []
    for coefficient in (0.0, 1.0):
        model = swapped(use_z_loss=True, loss_coefficients={"z_loss": coefficient}).train()
        losses.append(model(tokens, labels=tokens).loss)
        routed = next(m for m in model.modules() if isinstance(m, RoutedLayers))
    torch.testing.assert_close(losses[1] - losses[0], routed.routing.z_loss)
    with pytest.raises(ValueError, match="loss_coefficients: expected names among"):
        swapped(loss_coefficients={"zloss": 1.0})


def test_bad_swaps(tmp_path):
    with pytest.raises(ValueError, match=r"0 <= first < end <= 8, got \(1, 9\)"):
        mor.swap(dense_models()["llama"], (1, 9), 2)
    with pytest.raises(ValueError, match="4 recursions must divide the 6 layers"):
        swapped(num_recursions=4)
    with pytest.raises(ValueError, match=r"given by its index, as in layers=3"):
        mor.swap(dense_models()["llama"], (3, 4), 2)
    with pytest.raises(ValueError, match=r"index of a layer below 8, .*, got 8"):
        mor.swap(dense_models()["llama"], 8, 2)
    for wrong in ("3", (1, 4, 7), (1.0, 7.0)):
        with pytest.raises(ValueError, match="expected layers to be a range"):
            mor.swap(dense_models()["llama"], wrong, 3)
    with pytest.raises(ValueError, match=r"TokenChoice has no option \['kv_strategy'\], only"):
        swapped(router="token", kv_strategy="shared")
    with pytest.raises(ValueError, match="router to be expert or token"):
        swapped(router="none")
    with pytest.raises(ValueError, match=r"got None; for recursion without a router, MoRFor"):
        swapped(router=None)
    with pytest.raises(ValueError, match="routed layers already"):
        mor.swap(swapped(), (0, 1), 1)
    with pytest.raises(ValueError, match=r"expected a model of one of .*, got 'Linear'"):
        mor.swap(torch.nn.Linear(2, 2), (0, 1), 1)
    with pytest.raises(ValueError, match="a cache of 1 layers"):
        swapped().eval()(prompts(1, 4), past_key_values=DynamicCache())
    dense_models()["llama"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no swapped model"):
        mor.load_swapped(tmp_path)
    with pytest.raises(OSError, match=r"^load_swapped: no model in .*/nothing: expected a folder"):
        mor.load_swapped(tmp_path / "nothing")


def test_architectures_that_cannot_be_swapped_are_refused_with_the_reason():
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)
    gemma3 = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_hidden_layers=4, head_dim=8))
    with pytest.raises(ValueError, match=r"got 'gemma3_text'; its layers are of two attention"):
        mor.swap(gemma3, (1, 3), 2)
    with pytest.raises(ValueError, match=r"got 'mor'; it has recursions already"):
        mor.swap(small_model(), (1, 4), 3)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"expected a model of one of \['cohere', .*got 'gpt2'"):
        mor.swap(gpt2, (0, 2), 2)
