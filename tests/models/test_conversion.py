"""Dense checkpoints become MoR models."""

import copy

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import mor
from mor import MoRConfig, MoRForCausalLM
from mor.models.conversion import INITIALISATIONS, source_layers

from .conftest import small_config
from .test_generation import generate_greedily, prompts

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def dense_models():
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(small_config().base_config),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True)),
        "mistral": MistralForCausalLM(
            MistralConfig(**SIZES, head_dim=16, sliding_window=None, tie_word_embeddings=False)
        ),
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_one_recursion_reproduces_the_dense_model(name, tmp_path):
    dense = dense_models()[name].eval()
    dense.save_pretrained(tmp_path)
    tokens = prompts(2, 20)
    for source in (dense, tmp_path):
        model = MoRForCausalLM.from_dense(source, num_recursions=1, router=None).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5
            )
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **greedy), dense.generate(tokens, **greedy))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("router", ["expert", "token"])
def test_converted_models_train_and_generate(name, router):
    model = MoRForCausalLM.from_dense(dense_models()[name], num_recursions=3, router=router)
    tokens = prompts(2, 12)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    sequences, logits = generate_greedily(model.eval(), tokens, steps=6)
    with torch.no_grad():
        full = model(sequences[:, :-1]).logits[:, 11:]
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("sharing", ["middle_cycle", "cycle", "middle_sequence", "sequence"])
def test_layers_come_from_where_they_should(init, sharing):
    layers = 8 if sharing.startswith("middle") else 6
    config = small_config(num_hidden_layers=layers, sharing=sharing, router=None)
    dense = LlamaForCausalLM(config.base_config)
    sources = source_layers(config, layers, init, seed=3)
    assert len(sources) == config.num_unique_layers
    model = MoRForCausalLM.from_dense(dense, config, init=init, seed=3)
    for layer, indices in zip(model.model.layers, sources, strict=True):
        for name, weight in layer.named_parameters():
            want = torch.stack([dense.model.layers[i].get_parameter(name) for i in indices])
            torch.testing.assert_close(weight, want.mean(0))
    if sharing.startswith("middle"):
        assert sources[0] == [0]
        assert sources[-1] == [layers - 1]


def test_source_layers_of_the_paper():
    """SmolLM-360M, 32 layers, three recursions: ten shared layers between the ends."""
    config = small_config(num_hidden_layers=32)
    stepwise = [s[0] for s in source_layers(config, 32)]
    assert stepwise == [0, 1, 4, 7, 11, 14, 17, 20, 24, 27, 30, 31]
    assert [s[0] for s in source_layers(config, 32, "lower")] == [0, *range(1, 11), 31]
    assert [s[0] for s in source_layers(config, 32, "upper")] == [0, *range(21, 31), 31]
    average = source_layers(config, 32, "average")
    assert average[1] == [1, 11, 21]
    assert average[0] == [0]


#: Four shared layers for twelve depths, written out; the middle ones lie between own ends.
SOURCES = {
    ("cycle", "stepwise"): [[0], [4], [7], [11]],
    ("cycle", "lower"): [[0], [1], [2], [3]],
    ("cycle", "upper"): [[8], [9], [10], [11]],
    ("cycle", "average"): [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]],
    ("sequence", "stepwise"): [[0], [4], [7], [11]],
    ("sequence", "lower"): [[0], [1], [2], [3]],
    ("sequence", "upper"): [[8], [9], [10], [11]],
    ("sequence", "average"): [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
    ("middle_sequence", "stepwise"): [[0], [1], [5], [8], [12], [13]],
    ("middle_sequence", "lower"): [[0], [1], [2], [3], [4], [13]],
    ("middle_sequence", "upper"): [[0], [9], [10], [11], [12], [13]],
    ("middle_sequence", "average"): [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13]],
}


@pytest.mark.parametrize(("sharing", "init"), SOURCES)
def test_source_layers_by_hand(sharing, init):
    layers = 14 if sharing.startswith("middle") else 12
    config = small_config(num_hidden_layers=layers, sharing=sharing, router=None)
    assert source_layers(config, layers, init) == SOURCES[sharing, init]


def test_a_deeper_unrolled_model():
    """As the paper does for 30 layers and three recursions: 32 unrolled."""
    dense = LlamaForCausalLM(small_config(num_hidden_layers=7, num_recursions=5).base_config)
    model = MoRForCausalLM.from_dense(dense, num_recursions=3, num_hidden_layers=8)
    assert model.config.num_hidden_layers == 8
    assert len(model.model.layers) == 4


def test_bad_conversions(tmp_path):
    dense = LlamaForCausalLM(small_config().base_config)
    with pytest.raises(ValueError, match="expected init to be one of"):
        MoRForCausalLM.from_dense(dense, init="best")
    with pytest.raises(ValueError, match="4 recursions must divide the 6 layers"):
        MoRForCausalLM.from_dense(dense, num_recursions=4)
    with pytest.raises(ValueError, match="expected a dense model of Qwen2Config, got LlamaConfig"):
        MoRForCausalLM.from_dense(dense, MoRConfig(base_config=Qwen2Config(**SIZES)))
    with pytest.raises(ValueError, match="got both"):
        MoRForCausalLM.from_dense(dense, small_config(), num_recursions=2)
    with pytest.raises(ValueError, match="got one with recursions already"):
        MoRForCausalLM.from_dense(mor.swap(copy.deepcopy(dense), 1, 2), num_recursions=2)
    with pytest.raises(ValueError, match="got one with recursions already"):
        MoRForCausalLM.from_dense(MoRForCausalLM(small_config()), num_recursions=2)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match=r"model_type 'mor', got 'llama'; .* converts a dense model"
    ):
        MoRForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(OSError, match="no-such"):
        MoRForCausalLM.from_dense(tmp_path / "no-such")
