"""mor.apply_mod: layers of a loaded model become Mixture-of-Depths layers, and back."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

import mor
from mor.models.swap import SWAPPABLE
from mor.models.swap.routed_layers import RoutedLayers
from mor.modules import RouterScore
from mor.schedules import Schedule, constant
from mor.training.callbacks import routing_line
from tests.models.conftest import check_causal_evaluation, small_llama
from tests.models.conftest import exactness as exactness  # a fixture
from tests.models.test_generation import generate_greedily, padded, prompts
from tests.models.test_swap_architectures import dense_model
from tests.support.host_reads import host_reads


def mod_llama(capacity=0.25, seed=0, **options):
    """Routers as of a trained model: logits that differ."""
    model = mor.apply_mod(small_llama(seed), capacity, **options)
    torch.manual_seed(seed)
    for block in blocks(model):
        torch.nn.init.normal_(block.recursion.routers[0].layers[0].weight, std=0.2)
    return model


def blocks(model):
    return [layer for layer in model.model.layers if isinstance(layer, RoutedLayers)]


@pytest.mark.parametrize("kind", SWAPPABLE)
def test_every_architecture_trains_generates_comes_back_and_is_dense_again(kind, tmp_path):
    dense = dense_model(kind)
    tokens = prompts(2, 12)
    with torch.no_grad():
        want = dense(tokens).logits
    before = type(dense), type(dense.model), {*dense.config.to_dict()}
    model = mor.apply_mod(dense, 0.5).train()
    assert [isinstance(layer, RoutedLayers) for layer in model.model.layers] == [False, True] * 3
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for block in blocks(model):
        assert block.routing.depths.reshape(2, 12).sum(dim=1).tolist() == [6, 6]
    model.eval()
    options = {"max_new_tokens": 3, "do_sample": False}
    generated = model.generate(tokens, **options)
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    assert torch.equal(loaded.generate(tokens, **options), generated)
    for again in (mor.remove(model), mor.remove(loaded)):
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, want)
    assert (type(model), type(model.model), {*model.config.to_dict()}) == before
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_cached_generation_equals_full_forward(aux):
    model = mod_llama(aux=aux).eval()
    tokens, mask = padded([5, 9, 2], "left")
    sequences, logits = generate_greedily(model, tokens, mask)
    depths = set()
    for row, n in enumerate([5, 9, 2]):
        whole = sequences[row : row + 1, tokens.shape[1] - n :]
        with torch.no_grad():
            output = model(whole, use_cache=False)
        depths |= {*output.token_depths.flatten().tolist()}
        torch.testing.assert_close(logits[row], output.logits[0, n - 1 : -1], atol=1e-4, rtol=0)
    assert len(depths) > 1  # tokens really differ


def test_a_layer_keeps_keys_of_the_tokens_that_took_it_alone():
    model, cache = mod_llama().eval(), DynamicCache()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        output = model(prompts(2, 16), past_key_values=cache)
    kept = torch.zeros(2, dtype=torch.int64)
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer, RoutedLayers):
            taken = layer.routing.depths.reshape(2, 16).sum(dim=1)
            assert torch.equal(cache.layers[index].lengths, taken)
            kept += taken
    assert torch.equal(output.token_depths.sum(dim=1), kept)
    assert 0 < kept.sum() < 4 * 32


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_evaluation_is_causal(aux, exactness):
    check_causal_evaluation(mod_llama(aux=aux), prompts(2, 16), (1, 7, 15), exactness)


@pytest.mark.parametrize("aux", ["loss", "router"])
def test_it_trains_with_the_trainer(aux, tmp_path):
    model = mor.apply_mod(small_llama(), 0.25, aux=aux)
    tokens = prompts(8, 16)
    rows = [{"input_ids": t, "labels": t} for t in tokens]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, report_to="none", save_strategy="no", use_cpu=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    output = model.train()(tokens, labels=tokens)
    lm = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    each = torch.stack([block.routing.aux_loss for block in blocks(model)])
    torch.testing.assert_close(output.aux_loss, each.sum())
    torch.testing.assert_close(output.loss, lm + 0.001 * each.sum())
    assert len(output.routing.steps) == len(each)


def test_checkpointed_training_has_the_gradients_of_plain_training():
    tokens, grads = prompts(2, 16), []
    for checkpointing in (False, True):
        model = mod_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        assert output.token_depths.sum(dim=1).tolist() == [16, 16]
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_training_waits_for_the_device_no_more_often_than_the_dense_model():
    """Transformers itself looks once whether positions restart."""
    tokens, counts = prompts(2, 16), []
    for model in (small_llama(), mod_llama()):
        with host_reads() as reads:
            model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        counts.append(len(reads))
    assert counts[0] == counts[1] <= 1


def test_packed_documents_route_and_attend_alone():
    model, lengths = mod_llama().eval(), [5, 1, 9]
    tokens = prompts(1, 15)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits[0]
        alone = [model(t, use_cache=False).logits[0] for t in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pads_change_nothing_in_training():
    model = mod_llama(0.5).train()
    tokens, mask = padded([6, 11], "right")
    with torch.no_grad():
        got = model(tokens, attention_mask=mask).logits
        for row, n in enumerate([6, 11]):
            alone = model(tokens[row : row + 1, :n]).logits[0]
            torch.testing.assert_close(got[row, :n], alone, atol=1e-5, rtol=1e-5)


def test_a_schedule_says_which_layers_and_how_much():
    ratios = [1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0.125, 1.0]
    model = mor.apply_mod(small_llama(), Schedule(ratios)).train()
    model(prompts(2, 16))
    taken = [
        layer.routing.depths.reshape(2, 16).sum(dim=1).tolist()
        if isinstance(layer, RoutedLayers)
        else [16, 16]
        for layer in model.model.layers
    ]
    assert taken == [[int(16 * ratio)] * 2 for ratio in ratios]
    every = mor.apply_mod(small_llama(), 0.5, every=3)
    assert [isinstance(layer, RoutedLayers) for layer in every.model.layers] == [
        index % 3 == 2 for index in range(8)
    ]


@pytest.mark.slow
def test_compiled_training():
    torch._dynamo.reset()
    model, tokens = small_llama(), prompts(2, 16)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    mor.apply_mod(model, 0.25).train()
    want = model(tokens, labels=tokens)
    got = torch.compile(model, backend="aot_eager")(tokens, labels=tokens)
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.token_depths, want.token_depths)
    got.loss.backward()
    torch._dynamo.reset()


def test_autocast_and_half():
    tokens = prompts(2, 16)
    model = mod_llama().train()
    want = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens, labels=tokens).loss, want, atol=0.1, rtol=0)
    half = mor.apply_mod(small_llama().to(torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.train()(tokens, labels=tokens).loss.backward()


def test_copies_and_pickles():
    model, tokens = mod_llama().eval(), prompts(2, 9)
    with torch.no_grad():
        want = model(tokens).logits
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(same(tokens).logits, want)
            mor.remove(same)
            assert torch.equal(same(tokens).logits, mor.remove(mod_llama()).eval()(tokens).logits)


def test_adapters_train_beside_the_routers(tmp_path):
    peft = pytest.importorskip("peft")
    mod_llama().save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["recursion"]}
    model = peft.get_peft_model(mod_llama(), peft.LoraConfig(r=2, **options))
    tokens = prompts(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapters")
    base = mor.load_swapped(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        want = model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, want)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, want, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(layer, RoutedLayers) for layer in mor.remove(merged).model.layers)


def test_options_come_back(tmp_path):
    model = mod_llama(score=RouterScore("tanh", 0.3), aux="router", router_type="mlp").eval()
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    recursion = blocks(loaded)[0].recursion
    assert (recursion.score, recursion.aux) == (RouterScore("tanh", 0.3), "router")
    assert [block.recursion.capacities for block in blocks(loaded)] == [[0.25]] * 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(prompts(2, 9)).logits, model(prompts(2, 9)).logits)


def test_a_swap_is_taken_off_where_no_layer_is_gone():
    dense, tokens = small_llama().eval(), prompts(2, 9)
    with torch.no_grad():
        want = dense(tokens).logits
        assert torch.equal(mor.remove(mor.swap(dense, (1, 5), 1)).eval()(tokens).logits, want)
    with pytest.raises(ValueError, match="remove: expected layers that are used once"):
        mor.remove(mor.swap(dense, (1, 7), 3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity": 0}, r"^apply_mod: capacity: expected a share in \(0, 1\], got 0"),
        ({"capacity": 1.0}, "^apply_mod: capacity: expected a ratio below 1, got 1 for every"),
        ({"capacity": constant(3, 0.5)}, "^apply_mod: capacity: .* each of the 8 layers, got 3"),
        ({"capacity": constant(8, 0.5), "every": 3}, "^apply_mod: every: a Schedule names its"),
        ({"every": 0}, "^apply_mod: every: expected 1 to 8"),
        ({"every": 9}, "^apply_mod: every: expected 1 to 8, the number of layers, got 9"),
        ({"gating": "weighted"}, "^apply_mod: gating: a Mixture-of-Depths layer"),
        ({"capacities": [0.5]}, "^apply_mod: capacities: "),
        ({"foo": 1}, r"^apply_mod: ExpertChoice has no option \['foo'\], only"),
        ({"aux": "x"}, "^aux: expected loss"),
        ({"loss_coefficients": {"x": 1.0}}, "^apply_mod: loss_coefficients: expected names among"),
    ],
    ids=str,
)
def test_bad_options_are_named_and_leave_the_model_alone(options, sentence):
    dense = small_llama()
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match=sentence):
        mor.apply_mod(dense, **options)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before
    assert all(layer.self_attn.config is dense.config for layer in dense.model.layers)


def test_models_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"^apply_mod: expected a model of one of .*'Linear'"):
        mor.apply_mod(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^apply_mod: expected a model of one of .*already"):
        mor.apply_mod(mor.MoRForCausalLM(mor.MoRConfig(base_config=small_llama().config)))
    with pytest.raises(ValueError, match=r"^apply_mod: the model has routed layers already"):
        mor.apply_mod(mod_llama())
    with pytest.raises(ValueError, match="remove: expected a model that mor changed, got a Llama"):
        mor.remove(small_llama())
    with pytest.raises(ValueError, match="apply_mod: expected past_key_values = Dyn"):
        mod_llama().eval()(prompts(1, 4), past_key_values=DynamicCache())


def test_logs_had_the_metrics_of_the_last_routed_layer_alone():
    model = mod_llama(Schedule([1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0.125, 1.0])).train()
    tokens = prompts(2, 16)
    model(tokens)
    each = [block.recursion.metrics.compute() for block in blocks(model)]
    assert [metrics["selected_share_1"] for metrics in each] == [0.5, 0.25, 0.125]
    logged = routing_line(model, torch.device("cpu"))
    assert logged.keys() == each[0].keys()
    for name, value in logged.items():
        assert value == pytest.approx(sum(metrics[name] for metrics in each) / 3)
    assert routing_line(model, torch.device("cpu")) == {}  # the next line counts anew
