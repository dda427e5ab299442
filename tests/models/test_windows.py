"""Sliding windows: Gemma 3 and windowed Mistral, Qwen2 and Qwen3."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import mor
from mor import MoRConfig, MoRForCausalLM, analysis

from .conftest import VARIANTS
from .test_conversion import SIZES
from .test_generation import generate_greedily, padded, prompts

#: Own ends and two shared layers, of which the first is windowed; the windows are shorter than all
#: sequences below.
TYPES = ["sliding_attention", *["sliding_attention", "full_attention"] * 3, "full_attention"]
SLIDING = {"use_sliding_window": True, "layer_types": TYPES}
DENSE = {
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES, head_dim=24, sliding_window=6, layer_types=TYPES, query_pre_attn_scalar=16
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=16, sliding_window=5)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, **SLIDING, sliding_window=4)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, **SLIDING, sliding_window=7, head_dim=24)),
}
WINDOWED = pytest.mark.parametrize("name", DENSE)


def dense_model(name: str, **changed) -> PreTrainedModel:
    kind, config = DENSE[name]
    config = copy.deepcopy(config)
    for option, value in changed.items():
        setattr(config, option, value)
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # norms and biases too: zeros would hide what they do
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def windowed(name: str, seed: int = 0, **options) -> MoRForCausalLM:
    torch.manual_seed(seed)
    base = copy.deepcopy(DENSE[name][1])
    if "num_hidden_layers" in options:  # a cycle without own ends
        base.num_hidden_layers = options.pop("num_hidden_layers")
        if getattr(base, "layer_types", None):
            base.layer_types = base.layer_types[1 : base.num_hidden_layers + 1]
    return MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3, **options))


@WINDOWED
def test_one_recursion_reproduces_the_dense_model(name, tmp_path):
    dense = dense_model(name)
    dense.save_pretrained(tmp_path)
    tokens = prompts(2, 20)
    with torch.no_grad():
        want = dense(tokens).logits
        full = dense_model(name, sliding_window=64)(tokens).logits
    assert (want - full).abs().max() > 1e-3  # the window matters
    for source in (dense, tmp_path):
        model = MoRForCausalLM.from_dense(source, num_recursions=1, router=None).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, want, atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **greedy), dense.generate(tokens, **greedy))


@WINDOWED
@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence"])
def test_without_a_router_it_is_the_dense_model_of_the_unrolled_layers(name, sharing, tmp_path):
    """The same weights at every depth that uses them; padded, saved and loaded as well."""
    types = TYPES
    if sharing == "middle_sequence":
        types = [*TYPES[:1], *["sliding_attention"] * 3, *["full_attention"] * 3, *TYPES[-1:]]
    dense = dense_model(name, **({} if name == "mistral" else {"layer_types": types}))
    config = MoRConfig(base_config=dense.config, num_recursions=3, router=None, sharing=sharing)
    model = MoRForCausalLM.from_dense(dense, config).eval()
    model.save_pretrained(tmp_path)
    unrolled = type(dense)(dense.config).eval()
    unrolled.load_state_dict(dense.state_dict())
    for layer, unique in zip(unrolled.model.layers, config.layer_schedule, strict=True):
        layer.load_state_dict(model.model.layers[unique].state_dict())
    tokens, mask = padded([20, 13], "left")
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        want = unrolled(tokens, attention_mask=mask, position_ids=positions).logits
        for mine in (model, MoRForCausalLM.from_pretrained(tmp_path).eval()):
            got = mine(tokens, attention_mask=mask).logits
            torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_gradients_are_those_of_the_dense_model(name):
    dense = dense_model(name).train()
    model = MoRForCausalLM.from_dense(dense, num_recursions=1, router=None).train()
    tokens = prompts(2, 20)
    for each in (dense, model):
        each(tokens, labels=tokens).loss.backward()
    for key, parameter in dense.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(key).grad, parameter.grad, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize(
    "variant", ["expert", "expert-hybrid", "token", "token-shared", "token-cycle", "recursive"]
)
def test_cached_generation_equals_full_forward(name, variant):
    model = windowed(name, **VARIANTS[variant]).eval()
    tokens, mask = padded([12, 3, 9], "left")
    sequences, cached = generate_greedily(model, tokens, mask)
    for row in range(3):
        whole = sequences[row][12 - int(mask[row].sum()) :].unsqueeze(0)
        with torch.no_grad():
            full = model(whole).logits[0, -9:-1]
            cache = DynamicCache(config=model.config)  # and in pieces that cross the window
            pieces = [model(piece, past_key_values=cache).logits for piece in whole.split(5, 1)]
        torch.testing.assert_close(cached[row], full, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(pieces, 1)[0, -9:-1], full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize("router", ["expert", "token", None])
def test_no_logit_depends_on_a_later_token(name, router):
    model = windowed(name, router=router).eval()
    tokens = prompts(1, 24)
    changed = tokens.clone()
    changed[0, 15] = (tokens[0, 15] + 7) % 90 + 3
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :15], before[:, :15], atol=1e-5, rtol=0)
    assert (after[:, 15] - before[:, 15]).abs().max() > 1e-3


def test_two_windowed_layers_reach_as_far_as_two_windows():
    config = copy.deepcopy(DENSE["mistral"][1])
    config.num_hidden_layers = 2
    mor_config = MoRConfig(base_config=config, num_recursions=2, sharing="cycle", router=None)
    model = MoRForCausalLM(mor_config).eval()
    tokens = prompts(1, 24)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 7) % 90 + 3
    with torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
    reach = 2 * (5 - 1)
    assert (difference[: reach + 1] > 1e-7).all()
    assert difference[reach + 1 :].max() < 1e-6


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize("variant", ["expert", "token-shared", "expert-hybrid", "recursive"])
def test_gradient_checkpointing_changes_nothing(name, variant):
    model = windowed(name, **VARIANTS[variant]).train()
    tokens = prompts(2, 16)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_gemma_modules_start_as_in_transformers(tmp_path):
    """Norms at 0 (they multiply by 1 + weight), the embedding's scale, two rotary frequencies."""
    model = windowed("gemma3")
    assert not any(p.any() for n, p in model.named_parameters() if "norm" in n)
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.embed_tokens.embed_scale == SIZES["hidden_size"] ** 0.5
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for key, buffer in model.model.rotary_emb.named_buffers():
        assert torch.equal(loaded.model.rotary_emb.get_buffer(key), buffer)
    kinds = [layer.self_attn.layer_type for layer in loaded.model.layers]
    assert kinds == [TYPES[i] for i in (0, 1, 2, 7)]


def test_uses_of_a_layer_must_agree_on_its_type():
    base = copy.deepcopy(DENSE["gemma3"][1])
    base.layer_types = ["sliding_attention"] * 5 + ["full_attention"] * 3
    with pytest.raises(ValueError, match=r"depths 1 and 3 and 5 share a layer but differ"):
        MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3))
    MoRForCausalLM(MoRConfig(base_config=base, num_recursions=1))
    for recursions in (2, 4):  # Gemma 3's own pattern, five windowed layers and a full one
        base = Gemma3TextConfig(**SIZES | {"num_hidden_layers": 26}, head_dim=16)
        MoRForCausalLM(MoRConfig(base_config=base, num_recursions=recursions))


def test_a_deeper_model_needs_the_types_of_its_layers(tmp_path):
    alike = dense_model("qwen2", layer_types=["sliding_attention"] * 8)
    model = MoRForCausalLM.from_dense(alike, num_recursions=3, num_hidden_layers=11)
    assert all(layer.self_attn.sliding_window == 4 for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    assert len(MoRForCausalLM.from_pretrained(tmp_path).config.base_config.layer_types) == 11
    with pytest.raises(ValueError, match="expected layer_types of 11 layers, got 8"):
        MoRForCausalLM.from_dense(dense_model("qwen3"), num_recursions=3, num_hidden_layers=11)


@pytest.mark.parametrize("router", [None, "expert"])
def test_flops_are_those_counted(router):
    model = windowed("mistral", router=router).train()
    length = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(prompts(8, length))
    counted = counter.get_total_flops() / (8 * length)
    # With a router the prediction spreads the selected tokens evenly over the sequence.
    assert counted == pytest.approx(
        analysis.flops_per_token(model.config, length), rel=1e-6 if router is None else 0.01
    )


def test_swap_of_windowed_layers():
    dense = dense_model("mistral")
    model = mor.swap(copy.deepcopy(dense), (1, 7), num_recursions=3, router="token").eval()
    tokens = prompts(2, 20)
    sequences, cached = generate_greedily(model, tokens)
    with torch.no_grad():
        full = model(sequences, use_cache=False).logits[:, 19:-1]
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="its layers are of two attention types"):
        mor.swap(dense_model("gemma3"), (1, 7), num_recursions=3)
