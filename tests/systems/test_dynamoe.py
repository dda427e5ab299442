"""mor.apply_dynamoe: a loaded decoder with mixtures of experts still does what models do."""

import copy
import io

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import mor
from mor.models.router_losses import collect_router_losses
from mor.models.swap import SWAPPABLE
from mor.modules import GATES, DynaMoE
from tests.models.conftest import small_config, small_model, small_swapped

TOKENS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def small_llama(seed: int = 0, num_layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = small_config().base_config
    config.num_hidden_layers = num_layers
    return LlamaForCausalLM(config)


def small_moe(num_experts=4, seed: int = 0, num_layers: int = 3, **options):
    """A small Llama with experts that differ, and a router that is not undecided."""
    dense = small_llama(seed, num_layers)
    model = mor.apply_dynamoe(dense, num_experts, **{"init": "fresh", **options})
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.router.layers[0].weight, std=0.3)
    return model


@pytest.mark.parametrize("kind", sorted({*SWAPPABLE} - {"starcoder2"}))
def test_experts_from_the_dense_mlp_give_its_logits(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    want = model(TOKENS).logits
    mor.apply_dynamoe(model, 3, gate="mass", threshold=0.9)
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=1e-4, atol=1e-5)
    assert isinstance(model.model.layers[0].mlp, DynaMoE)


def test_biases_are_copied() -> None:
    config = copy.deepcopy(small_llama().config)
    config.mlp_bias = True
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    want = model(TOKENS).logits
    got = mor.apply_dynamoe(model, 3)(TOKENS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_removal_gives_the_dense_model_back() -> None:
    model = small_llama().eval()
    dense, names = type(model), [*model.state_dict()]
    want = model(TOKENS).logits
    mor.apply_dynamoe(model, 4, init="fresh")
    assert not torch.equal(model(TOKENS).logits, want)
    twin = copy.deepcopy(model)
    mor.remove(model)
    assert type(model) is dense
    assert [*model.state_dict()] == names
    assert torch.equal(model(TOKENS).logits, want)
    # A copy has mixtures still, and its own way back.
    assert isinstance(twin.model.layers[0].mlp, DynaMoE)
    mor.remove(twin.double())
    torch.testing.assert_close(twin(TOKENS).logits.float(), want)
    with pytest.raises(
        ValueError, match="remove: expected a model that mor changed, got a LlamaForCausalLM"
    ):
        mor.remove(model)


def test_schedule_gives_each_layer_its_number() -> None:
    counts = mor.schedules.expert_schedule("descending", 3, 1, 8)
    model = small_moe(counts)
    assert tuple(layer.mlp.num_experts for layer in model.model.layers) == counts.values
    model(TOKENS)
    for layer in model.model.layers:
        assert layer.mlp.num_active_experts.shape == TOKENS.shape
        assert (layer.mlp.num_active_experts <= layer.mlp.num_experts).all()


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_balancing_loss_is_in_the_loss_in_training(coefficient: float) -> None:
    model = small_moe(noise=0.0, balancing_coefficient=coefficient)
    alone = model.eval()(TOKENS, labels=TOKENS).loss
    loss = model.train()(TOKENS, labels=TOKENS).loss
    balancing = [layer.mlp.routing.balancing_loss for layer in model.model.layers]
    want = alone + coefficient * torch.stack(balancing).mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    as_tuple = model(TOKENS, labels=TOKENS, return_dict=False)
    torch.testing.assert_close(as_tuple[0], loss)
    for layer in model.model.layers:
        assert layer.mlp.gate.router.layers[0].weight.grad.isfinite().all()
        assert (layer.mlp.experts.down_proj.grad != 0).any()


def test_pads_count_neither_for_the_loss_nor_for_tokens() -> None:
    model = small_moe(noise=0.0, balancing_coefficient=0.5)
    short = TOKENS[:1, :7]
    want = model(short, labels=short).loss
    padded = torch.cat([short, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    mask = padded != 0
    got = model(padded, attention_mask=mask.long(), labels=padded.masked_fill(~mask, -100)).loss
    torch.testing.assert_close(got, want)


def test_trainers_on_the_decoder_get_the_loss() -> None:
    model = small_moe(noise=0.0, balancing_coefficient=0.5)
    with collect_router_losses() as collected:
        model.model(TOKENS)
    assert collected.mean().item() > 0.4
    with collect_router_losses() as collected:
        model(TOKENS, labels=TOKENS)  # in whose loss it is
    assert collected.calls == 1
    assert collected.mean() is None


@pytest.mark.parametrize("gate", GATES)
def test_cached_generation_equals_the_full_pass(gate: str) -> None:
    model = small_moe(gate=gate)
    model(TOKENS)  # a running threshold has seen something
    model.eval()
    full = model(TOKENS).logits
    first = model(TOKENS[:, :5], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for i in range(5, TOKENS.shape[1]):
        steps.append(model(TOKENS[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)
    out = model.generate(TOKENS[:, :5], max_new_tokens=3, do_sample=False)
    alone = model.generate(TOKENS[:, :5], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(out, alone)


def test_state_dict_and_pickle() -> None:
    model = small_moe(gate="batch_quantile")
    model(TOKENS)
    want = model.eval()(TOKENS).logits
    other = small_moe(seed=1, gate="batch_quantile").eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(TOKENS).logits, want)


def test_trainer(tmp_path) -> None:
    model = small_moe(balancing_coefficient=0.5)
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=5e-3,
        logging_steps=1,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_steps=3,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert "model.layers.0.mlp.gate.router.layers.0.weight" in moved
    assert "model.layers.2.mlp.experts.up_proj" in moved
    model.eval()
    alone = model(TOKENS, labels=TOKENS).loss.item()
    assert trainer.evaluate(data[:2])["eval_loss"] == pytest.approx(alone, rel=1e-3)
    # A checkpoint resumes on a model to which the same was applied.
    again = Trainer(small_moe(seed=1), arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(again.model.eval()(TOKENS).logits, model(TOKENS).logits)


def test_compiles() -> None:
    model = small_moe(num_layers=1, gate="batch_quantile", noise=0.0)
    want = model(TOKENS, labels=TOKENS)
    want.loss.backward()
    grad = model.model.layers[0].mlp.experts.up_proj.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(TOKENS, labels=TOKENS)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    torch.testing.assert_close(
        model.model.layers[0].mlp.experts.up_proj.grad, grad, rtol=1e-4, atol=1e-6
    )


def test_autocast() -> None:
    model = small_moe(init="dense").eval()  # bfloat16 states may take other experts
    want = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(TOKENS, labels=TOKENS)
    assert output.loss.isfinite()
    torch.testing.assert_close(output.logits.float(), want, rtol=0.1, atol=0.2)


def test_peft_trains_adapters_on_it() -> None:
    peft = pytest.importorskip("peft")
    model = small_moe(balancing_coefficient=0.5, noise=0.0)
    want = model(TOKENS, labels=TOKENS).loss
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, want)
    loss.backward()
    trained = [name for name, p in tuned.named_parameters() if p.grad is not None]
    assert any("gate.router" in name for name in trained)
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "upcycled"}, "apply_dynamoe: init: expected one of .*, got 'upcycled'"),
        ({"balancing_coefficient": -1}, "balancing_coefficient: expected .* at least 0, got -1"),
        ({"num_experts": (4, 4)}, "expected one number for each of the 3 layers, got 2"),
        (
            {"num_experts": mor.schedules.constant(3, 0.5)},
            r"num_experts: expected a schedule of experts, got constant\(0\.5\) of the share",
        ),
        ({"gate": "top"}, "gate: expected one of .*, got 'top'"),
    ],
)
def test_bad_options_change_nothing(arguments: dict, message: str) -> None:
    model = small_llama()
    names = [*model.state_dict()]
    with pytest.raises(ValueError, match=message):
        mor.apply_dynamoe(model, **{"num_experts": 4, **arguments})
    assert [*model.state_dict()] == names
    assert not isinstance(model.model.layers[0].mlp, DynaMoE)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="mor has not changed, got one after apply_dynamoe"):
        mor.apply_dynamoe(small_moe(), 4)
    with pytest.raises(ValueError, match=r"mor has not changed, got one after mor\.swap"):
        mor.apply_dynamoe(small_swapped(), 4)
    with pytest.raises(ValueError, match="decoder layers, got Linear"):
        mor.apply_dynamoe(torch.nn.Linear(2, 2), 4)
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=97)
    )
    with pytest.raises(ValueError, match="apply_dynamoe: expected"):
        mor.apply_dynamoe(gpt2, 4)
    with pytest.raises(ValueError, match="apply_dynamoe: expected"):
        mor.apply_dynamoe(small_model(), 4)
