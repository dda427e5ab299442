"""Relaxed recursion: an adapter and norms for every use of a shared layer; recursion encoding."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from mor import MoRForCausalLM

from .conftest import check_causal_evaluation, small_config, small_model
from .test_conversion import dense_models
from .test_generation import generate_greedily, prompts

pytest.importorskip("peft")


pytestmark = pytest.mark.usefixtures("one_thread")


FULL = {"relaxation": "lora", "relaxation_rank": 64, "router": None}
ROUTED = {
    "expert": {"router": "expert"},
    "expert-shared": {"router": "expert", "kv_strategy": "shared"},
    "expert-hybrid": {"router": "expert", "kv_strategy": "hybrid"},
    "token": {"router": "token"},
    "token-shared": {"router": "token", "kv_strategy": "shared"},
    "sequence": {"router": None, "sharing": "sequence", "num_hidden_layers": 6},
}


def dense_llama(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A dense model whose norms are not all ones."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(small_config(layers, num_recursions=1).base_config).to(dtype).eval()
    return shaken(dense)


def shaken(dense):
    """The vectors of a new model are ones and zeros, which would hide that they are not copied."""
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return dense


def adapters(model):
    return {n: p for n, p in model.named_parameters() if "recursion_" in n}


@pytest.mark.parametrize("relaxation", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
@pytest.mark.parametrize(
    ("sharing", "recursions", "layers"),
    [("middle_cycle", 3, 8), ("cycle", 2, 6), ("middle_sequence", 2, 6), ("sequence", 3, 6)],
)
def test_the_full_rank_is_the_dense_model(relaxation, dtype, atol, sharing, recursions, layers):
    dense = dense_llama(layers, dtype)
    options = {**FULL, "relaxation": relaxation, "sharing": sharing, "num_recursions": recursions}
    model = MoRForCausalLM.from_dense(dense, init="average", **options).eval()
    assert len(model.model.layers) < layers
    tokens = prompts(2, 20)
    with torch.no_grad():
        want = dense(tokens).logits
        torch.testing.assert_close(model(tokens).logits, want, atol=atol, rtol=0)
        unrelaxed = MoRForCausalLM.from_dense(dense, init="average", svd_start=False, **options)
        assert (unrelaxed.eval()(tokens).logits - want).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_the_full_rank_is_the_dense_model_of_other_architectures(name):
    dense = shaken(dense_models()[name].eval())
    model = MoRForCausalLM.from_dense(dense, **FULL | {"relaxation_rank": 96}).eval()
    tokens = prompts(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=0)


def test_the_start_is_the_best_of_its_rank():
    dense = dense_llama(8, torch.float64)
    options = {**FULL, "relaxation_rank": 16}
    model = MoRForCausalLM.from_dense(dense, **options)
    linear = model.model.layers[1].mlp.up_proj
    for use, depth in enumerate((1, 3, 5)):  # of eight layers, three recursions of two
        name = f"recursion_{use}"
        product = linear.lora_B[name].weight @ linear.lora_A[name].weight * linear.scaling[name]
        residual = dense.model.layers[depth].mlp.up_proj.weight - linear.base_layer.weight
        left = torch.linalg.svdvals(residual)[16:].square().sum()
        torch.testing.assert_close((residual - product).square().sum(), left)


@pytest.mark.parametrize("relaxation", ["lora", "dora"])
def test_without_svd_the_start_is_the_shared_layer(relaxation):
    dense = dense_llama(8, torch.float32)
    plain = MoRForCausalLM.from_dense(dense, router=None).eval()
    model = MoRForCausalLM.from_dense(dense, router=None, relaxation=relaxation, svd_start=False)
    tokens = prompts(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("relaxation", ["lora", "dora"])
def test_a_new_model_starts_as_without_relaxation(relaxation):
    model = small_model(router=None, relaxation=relaxation).eval()
    plain = small_model(router=None).eval()
    shared = {
        n.replace(".base_layer", "").replace(".original_module", ""): p
        for n, p in model.state_dict().items()
        if "recursion_" not in n
    }
    plain.load_state_dict(shared)
    tokens = prompts(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("relaxation", ["lora", "dora"])
def test_every_adapter_learns_and_checkpointing_changes_no_gradient(name, relaxation):
    model = small_model(relaxation=relaxation, relaxation_rank=4, **ROUTED[name]).train()
    with torch.no_grad():  # with B = 0 no A has a gradient
        for parameter in adapters(model).values():
            parameter += 0.05 * torch.randn_like(parameter)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = prompts(2, 16)
    for trained in (model, checkpointed):
        trained(tokens, labels=tokens).loss.backward()
    for (label, one), two in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None, label
        torch.testing.assert_close(two.grad, one.grad, msg=label)
    for label, parameter in adapters(model).items():
        assert parameter.grad.abs().max() > 0, label


def test_reentrant_checkpointing_gives_the_same_gradients():
    model = small_model(relaxation="lora", relaxation_rank=4).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = prompts(2, 16)
    for trained in (model, checkpointed):
        trained(tokens, labels=tokens).loss.backward()
    for label, one in model.named_parameters():
        torch.testing.assert_close(checkpointed.get_parameter(label).grad, one.grad, msg=label)


@pytest.mark.parametrize("name", ROUTED)
def test_a_relaxed_model_saves_loads_and_generates(name, tmp_path):
    model = small_model(
        relaxation="dora", relaxation_rank=4, recursion_encoding=True, **ROUTED[name]
    ).eval()
    with torch.no_grad():
        for parameter in [*adapters(model).values(), model.model.recursion_encoding]:
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for label, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[label], tensor), label
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tokens = prompts(2, 12)
    sequences, logits = generate_greedily(loaded, tokens, steps=6)
    with torch.no_grad():
        full = model(sequences[:, :-1]).logits[:, 11:]
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("relaxation", ["lora", "dora"])
def test_evaluation_is_causal(name, relaxation, exactness):
    model = small_model(
        relaxation=relaxation, relaxation_rank=4, recursion_encoding=True, **ROUTED[name]
    )
    with torch.no_grad():
        for parameter in [*adapters(model).values(), model.model.recursion_encoding]:
            parameter += 0.05 * torch.randn_like(parameter)
    check_causal_evaluation(model, prompts(2, 16), (1, 7, 15), exactness)


def test_lora_fine_tuning_of_a_relaxed_model(tmp_path):
    """A user's own adapter is used beside the recursions', trains alone and is saved alone."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = small_model(relaxation="lora", relaxation_rank=4, router=None)
    shaken(model)  # the norms' copies differ
    model.requires_grad_(False)
    untouched = copy.deepcopy(model.state_dict())
    tokens = prompts(2, 12)
    before = model.eval()(tokens).logits.detach()
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(tuned.eval()(tokens).logits, before)
    mine = {n: p for n, p in tuned.named_parameters() if ".default." in n}
    assert mine
    with torch.no_grad():
        for parameter in mine.values():
            parameter.normal_(std=0.1)
    assert (tuned(tokens).logits - before).abs().max() > 1e-3
    tuned.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mine.values())
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == set(mine)

    tuned.save_pretrained(tmp_path)
    fresh = small_model(relaxation="lora", relaxation_rank=4, router=None)
    fresh.load_state_dict(untouched)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, tuned.eval()(tokens).logits)


def test_targets_can_be_chosen():
    model = small_model(relaxation="lora", relaxation_targets=["q_proj", "v_proj"])
    kinds = {n.split(".lora_")[0].rpartition(".")[2] for n in adapters(model) if ".lora_" in n}
    assert kinds == {"q_proj", "v_proj"}


def test_bad_options():
    with pytest.raises(ValueError, match=r"MoRConfig.relaxation: expected one of .*'dora'"):
        small_config(relaxation="prompt")
    with pytest.raises(ValueError, match="relaxation_rank: expected at least 1, got 0"):
        small_config(relaxation="lora", relaxation_rank=0)
    with pytest.raises(ValueError, match="there is nothing to relax"):
        small_config(num_recursions=1, router=None, relaxation="lora")
    with pytest.raises(ValueError, match=r"relaxation_targets: expected some of .*q_proj"):
        small_model(relaxation="lora", relaxation_targets=["qproj"])


@pytest.mark.parametrize("name", ROUTED)
def test_recursion_encoding_scales_the_output_of_every_recursion(name):
    tokens = prompts(2, 12)
    model = small_model(recursion_encoding=True, **ROUTED[name])
    plain = small_model(**ROUTED[name])
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=0, rtol=0)
    encoding = model.model.recursion_encoding
    model(tokens, labels=tokens).loss.backward()
    assert encoding.shape == (len(model.config.encoded_depths), model.config.hidden_size)
    assert bool((encoding.grad.abs().amax(dim=1) > 0).all())
    with torch.no_grad():
        encoding[2] *= 1.5
    assert (model.eval()(tokens).logits - plain.eval()(tokens).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("sharing", "depths"),
    [
        ("middle_cycle", [2, 4, 6]),
        ("middle_sequence", [1, 2, 3, 4, 5, 6]),
        ("cycle", [3, 7]),
        ("sequence", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_recursion_encoding_is_what_it_says(sharing, depths):
    """A model without router, layer by layer: vectors where the authors' code has them."""
    recursions = 3 if sharing.startswith("middle") else 2
    options = {"router": None, "sharing": sharing, "num_recursions": recursions}
    model = small_model(recursion_encoding=True, **options).eval()
    assert model.config.encoded_depths == depths
    with torch.no_grad():
        model.model.recursion_encoding.normal_(1, 0.1)
    vectors = dict(zip(depths, model.model.recursion_encoding, strict=True))
    scaled = small_model(**options).eval()
    scaled.load_state_dict(model.state_dict(), strict=False)
    calls = []

    def scale(layer, args, out):
        calls.append(1)
        return out * vectors.get(len(calls) - 1, 1.0)

    for layer in scaled.model.layers:
        layer.register_forward_hook(scale)
    tokens = prompts(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, scaled(tokens).logits)
    assert len(calls) == 8


def test_biases_stay_shared_with_dora():
    dense = shaken(dense_models()["qwen2"].eval())
    assert isinstance(dense, Qwen2ForCausalLM)
    model = MoRForCausalLM.from_dense(dense, router=None, relaxation="dora")
    assert not any("lora_B" in n and n.endswith("bias") for n, _ in model.named_parameters())


def test_a_whole_model_is_pickled_and_copied(tmp_path):
    model = small_model(relaxation="lora", relaxation_rank=2).eval()
    torch.save(model, tmp_path / "model.pt")
    tokens = prompts(1, 9)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits)
