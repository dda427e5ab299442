"""Which dense models `mor.swap` takes: a swap that changes nothing keeps their logits."""

import pytest
import torch
import transformers
from transformers import DynamicCache

import mor
from mor.models.swap import SWAPPABLE
from mor.modules import RouterScore

from .test_generation import prompts

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS = {
    "gemma": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
}


def dense_model(kind: str, **options):
    """Of any architecture; what starts at 0 or 1 counts as well."""
    config = transformers.CONFIG_MAPPING[kind](**SIZES, **OPTIONS.get(kind, {}), **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def identity_swap(model, layers=(1, 5)):
    """One recursion, and a gate of 2 * sigmoid(0) = 1."""
    model = mor.swap(model, layers, 1, gating="residual", score=RouterScore("sigmoid", 2.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".recursion." in name:
                parameter.zero_()
    return model


MASK = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])


@torch.no_grad()
def logits_of(model, how):
    tokens, positions = prompts(2, 12) * MASK, (MASK.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": MASK, "position_ids": positions}
    if how == "padded":
        return model(tokens, use_cache=False, **given).logits[MASK.bool()]
    cache = DynamicCache(config=model.config)
    parts = [
        model(
            tokens[:, a:b],
            attention_mask=MASK[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
        ).logits
        for a, b in ((0, 7), (7, 12))
    ]
    return torch.cat(parts, 1)[MASK.bool()]


@pytest.mark.parametrize("how", ["padded", "cached"])
@pytest.mark.parametrize("kind", SWAPPABLE)
def test_a_swap_that_changes_nothing_keeps_the_logits(kind, how):
    dense = dense_model(kind)
    want = logits_of(dense, how)
    got = logits_of(identity_swap(dense), how)
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", SWAPPABLE)
def test_every_architecture_trains_generates_and_comes_back(kind, tmp_path):
    model = mor.swap(dense_model(kind), (1, 5), 2, router="token").train()
    tokens = prompts(2, 8)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


REFUSED = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 2, "head_dim": 8},
    "stablelm": {},
    "nemotron": {},
    "diffllama": {},
    "ministral3": {"head_dim": 8},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_and_left_alone(kind):
    """They lost router logits, attention sinks or ended in an error of the first call."""
    dense = dense_model(kind, **REFUSED[kind])
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match=f"swap: expected a model of one of .*got '{kind}'"):
        mor.swap(dense, (1, 5), 2)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before


@pytest.mark.parametrize(
    "options",
    [
        {"attention_dropout": 0.1},
        {"layer_types": ["full_attention", "sliding_attention"] * 3, "use_sliding_window": True},
    ],
    ids=["dropout", "windows"],
)
def test_options_that_cannot_be_swapped_are_refused_and_the_model_left_alone(options):
    dense = dense_model("qwen2", **options)
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match="swap: "):
        mor.swap(dense, (1, 5), 2)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before


@pytest.mark.parametrize(
    "options",
    [{"capacities": [0.5, 0.7]}, {"score": {"function": "sine", "alpha": 1}}, {"gate": 1}],
    ids=str,
)
def test_wrong_options_leave_the_model_alone(options):
    dense = dense_model("llama")
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match=r"capacities: |score: |has no option \['gate'\]"):
        mor.swap(dense, (1, 5), 2, **options)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before
    assert all(layer.self_attn.config is dense.config for layer in dense.model.layers)


def test_models_with_another_head_are_refused_and_left_alone():
    """The first call of a swapped classifier ended in an AttributeError."""
    dense = transformers.LlamaForSequenceClassification(dense_model("llama").config)
    before = type(dense), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match="expected a LlamaForCausalLM, got LlamaForSeq"):
        mor.swap(dense, (1, 5), 2)
    assert (type(dense), [type(m) for m in dense.modules()]) == before
