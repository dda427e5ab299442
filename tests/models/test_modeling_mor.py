"""Training: losses, padding, packed documents, checkpointing, saving; and what is refused.

Over 300 lines in one file: they share the small models and their training step.
"""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mor import MoRConfig, MoRForCausalLM, MoRModel

from .conftest import check_causal_evaluation, small_config, small_model
from .test_generation import padded, prompts


def gradients(model: MoRForCausalLM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train_step(model: MoRForCausalLM, **inputs):
    model.train().zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(variant, side):
    """Every sequence of a padded batch gives what it gives alone, in training and evaluation."""
    model = small_model(**variant)
    lengths = [9, 4, 12]
    tokens, mask = padded(lengths, side)
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            batch = model(tokens, attention_mask=mask)
        for row in range(3):
            keep = mask[row] == 1
            with torch.no_grad():
                alone = model(tokens[row][keep].unsqueeze(0))
            torch.testing.assert_close(
                batch.logits[row][keep], alone.logits[0], atol=1e-5, rtol=1e-5
            )
            assert torch.equal(batch.token_depths[row][keep], alone.token_depths[0])
            assert not batch.token_depths[row][~keep].any()


def test_pads_do_not_change_the_loss(variant):
    model = small_model(**variant)
    tokens = prompts(2, 10)
    plain, grads = train_step(model, input_ids=tokens, labels=tokens)
    filler = torch.zeros(2, 3, dtype=torch.int64)
    output, grads_padded = train_step(
        model,
        input_ids=torch.cat([tokens, filler], 1),
        attention_mask=torch.cat([torch.ones_like(tokens), filler], 1),
        labels=torch.cat([tokens, filler - 100], 1),
    )
    torch.testing.assert_close(output.loss, plain.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_padded[name], grad, atol=1e-6, rtol=1e-4)


def packed_documents(lengths: list[int], how: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One row of documents, and the argument `how` that says where they begin."""
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return prompts(1, sum(lengths)), {how: positions if how == "position_ids" else boundaries}


def test_documents_do_not_see_each_other(variant):
    """A packed row gives every document the logits it has alone."""
    model = small_model(**variant)
    lengths = [5, 1, 9, 3]
    tokens, options = packed_documents(lengths, "position_ids")
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            packed = model(tokens, **options).logits[0]
            alone = [model(piece).logits[0] for piece in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_evaluation_is_causal(variant, exactness):
    """Changing later tokens changes no earlier logit: not a bit, if matrix products do not."""
    check_causal_evaluation(small_model(**variant), prompts(2, 24), (1, 8, 17, 23), exactness)


def test_documents_are_the_same_by_positions_and_by_boundaries(variant):
    """So what holds of one way to say where documents begin holds of the other."""
    model = small_model(**variant)
    for mode in (True, False):
        model.train(mode)
        by_way = []
        for how in ("position_ids", "cu_seq_lens_q"):
            tokens, options = packed_documents([5, 1, 9, 3], how)
            with torch.no_grad():
                by_way.append(model(tokens, **options))
        assert torch.equal(by_way[0].logits, by_way[1].logits)
        assert torch.equal(by_way[0].token_depths, by_way[1].token_depths)


def test_evaluation_of_packed_documents_is_causal(variant, exactness):
    """Changing later documents, or the later tokens of one, changes nothing before them."""
    tokens, inputs = packed_documents([5, 1, 9, 3], "position_ids")
    cuts = (3, 5, 10, 15)  # the second and the last between documents
    check_causal_evaluation(small_model(**variant), tokens, cuts, exactness, **inputs)


def test_topk_evaluation_is_the_training_selection():
    model = small_model(eval_routing="topk")
    tokens = prompts(2, 24)
    with torch.no_grad():
        train, evaluated = model.train()(tokens), model.eval()(tokens)
    assert torch.equal(train.token_depths, evaluated.token_depths)
    counts = [int((train.token_depths[0] > step).sum()) for step in range(3)]
    assert counts == [24, 16, 8]


def test_topk_evaluation_has_no_cache():
    model = small_model(eval_routing="topk").eval()
    tokens = prompts(2, 8)
    assert model(tokens).past_key_values is None
    with pytest.raises(ValueError, match='eval_routing="topk" ranks whole sequences'):
        model.generate(tokens, max_new_tokens=2, do_sample=False)
    new = model.generate(tokens, max_new_tokens=2, do_sample=False, use_cache=False)[:, 8]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, -1].argmax(-1), new)


def test_integers_are_numbers():
    config = small_config(capacities=[1, 2 / 3, 1 / 3], router_alpha=1, router_z_coef=0)
    assert config.capacities == [1, 2 / 3, 1 / 3]
    assert MoRConfig.from_dict(config.to_dict()).router_alpha == 1


def test_sampling_accuracy_is_that_of_the_router_evaluation_uses():
    model = small_model(router_aux="router").train()
    with torch.no_grad():
        for router in model.model.recursion.aux_routers:
            for parameter in router.parameters():
                parameter.zero_()  # never above the threshold: agrees where nothing is selected
    model(prompts(2, 24))
    accuracy = model.model.routing_metrics.compute()["sampling_accuracy"]
    # Of 24, 24, 16 candidates 24, 16, 8 are selected.
    assert accuracy == pytest.approx((0 + 8 + 8) / 64)
    model.routing_metrics.reset()
    model.eval()(prompts(2, 24))  # by the threshold itself: there is nothing to agree with
    assert "sampling_accuracy" not in model.routing_metrics.compute()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(variant, reentrant):
    if reentrant and variant.get("kv_strategy", "recursion") != "recursion":
        pytest.skip("reentrant checkpointing with KV sharing is refused, tested below")
    model = small_model(**variant)
    tokens = prompts(2, 16)
    plain, grads = train_step(model, input_ids=tokens, labels=tokens)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    output, again = train_step(model, input_ids=tokens, labels=tokens)
    assert torch.equal(output.loss, plain.loss)
    assert again.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_with_shared_keys_is_refused():
    model = small_model(router=None, kv_strategy="shared")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        train_step(model, input_ids=prompts(1, 8), labels=prompts(1, 8))


def test_every_parameter_gets_a_gradient(variant):
    model = small_model(**variant)
    _, grads = train_step(model, input_ids=prompts(2, 16), labels=prompts(2, 16))
    expected = {n for n, _ in model.named_parameters()}
    assert set(grads) == expected


def test_steps_that_no_token_takes_still_reach_every_parameter():
    """All tokens exit after the first recursion: other processes may still wait for the rest."""
    model = small_model(router="token")
    router = model.model.recursion.router.layers[0]
    with torch.no_grad():
        router.weight.zero_()  # all scores equal: the first output wins
    output, grads = train_step(model, input_ids=prompts(1, 6), labels=prompts(1, 6))
    assert output.token_depths.unique().tolist() == [1]
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(g.isfinite().all() for g in grads.values())


def test_accumulation_does_not_change_the_weight_of_any_loss(variant):
    model = small_model(**variant)
    model.train()
    tokens = prompts(4, 12)
    items = 4 * 11
    parts = [
        model(tokens[i : i + 1], labels=tokens[i : i + 1], num_items_in_batch=items)
        for i in range(4)
    ]
    router = [p.router_loss for p in parts if p.router_loss is not None]
    lm = model(tokens, labels=tokens).lm_loss
    expected = lm + (sum(router) / 4 if router else 0)
    torch.testing.assert_close(sum(p.loss for p in parts), expected)


def comparable(config: MoRConfig) -> dict:
    """The config without what loading adds: where from, and in which dtype."""
    values = config.to_dict()
    values["base_config"].pop("dtype")
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "dtype")}


def test_save_and_load(variant, tmp_path):
    model = small_model(**variant).eval()
    model.save_pretrained(tmp_path)
    tokens = prompts(2, 9)
    want = model(tokens).logits
    for loaded in (
        MoRForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is MoRForCausalLM
        assert comparable(loaded.config) == comparable(model.config)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        torch.testing.assert_close(loaded.eval()(tokens).logits, want)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoRConfig)
    assert isinstance(config.base_config, LlamaConfig)


def test_saved_model_loads_without_importing_mor_first(tmp_path):
    small_model().save_pretrained(tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM as A\n"
        f"print(type(A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MoRForCausalLM", done.stderr


def test_a_corrupt_checkpoint_is_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|invalid|safetensors"):
        MoRForCausalLM.from_pretrained(tmp_path)


def test_without_router_and_sharing_it_is_the_dense_model():
    config = small_config(num_hidden_layers=4, num_recursions=1, router=None, sharing="cycle")
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config.base_config).eval()
    model = MoRForCausalLM(config).eval()
    model.load_state_dict(dense.state_dict())
    tokens = prompts(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_dense_models_config_is_left_alone():
    base = small_config().base_config
    base._attn_implementation = "sdpa"
    before = base.to_dict()
    MoRForCausalLM(MoRConfig(base_config=base))
    assert base.to_dict() == before
    assert base._attn_implementation == "sdpa"


def test_bfloat16_trains():
    model = small_model().to(torch.bfloat16)
    output, grads = train_step(model, input_ids=prompts(2, 16), labels=prompts(2, 16))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("router", ["expert", "token"])
def test_autocast_trains(router):
    model = small_model(router=router)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = train_step(model, input_ids=prompts(2, 16), labels=prompts(2, 16))
    assert output.loss.isfinite()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


def test_capacity_warmup_survives_a_checkpoint(tmp_path):
    model = small_model(capacity_warmup_steps=10).train()
    tokens = prompts(1, 24)
    shares = [int((model(tokens).token_depths > 1).sum()) for _ in range(6)]
    assert shares[0] == 24
    assert shares[-1] < 24
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path).train()
    for _ in range(5):
        want, got = model(tokens).token_depths, loaded(tokens).token_depths
        assert torch.equal(want, got)
    assert int((model(tokens).token_depths > 1).sum()) == 16


def test_capacity_warmup_is_half_a_cosine():
    """c + (1 - c) (1 + cos(pi t / 4)) / 2 of 25 tokens, rounded down, for c = 2/3 and 1/3."""
    model = small_model(capacity_warmup_steps=4).train()
    depths = [model(prompts(1, 25)).token_depths for _ in range(6)]
    # What is left of the warm-up: 1, 0.854, 0.5, 0.146, 0, 0.
    assert [int((d > 1).sum()) for d in depths] == [25, 23, 20, 17, 16, 16]
    assert [int((d > 2).sum()) for d in depths] == [25, 22, 16, 10, 8, 8]


def test_balance_warmup_takes_every_recursion():
    model = small_model(router="token", balance_warmup_steps=2).train()
    depths = [model(prompts(1, 24)).token_depths.unique().tolist() for _ in range(3)]
    assert depths[:2] == [[3], [3]]
    assert depths[2] != [3]


def test_resized_embeddings_are_saved_and_loaded(tmp_path):
    model = small_model()
    model.resize_token_embeddings(120)
    assert model.config.base_config.vocab_size == model.config.vocab_size == 120
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape == (120, 64)


def test_options_of_the_dense_model_are_written_to_it():
    config = MoRConfig(base_config=small_config().base_config, rms_norm_eps=1e-3)
    assert config.base_config.rms_norm_eps == config.rms_norm_eps == 1e-3
    assert "rms_norm_eps" not in config.__dict__


def test_balance_warmup_leaves_the_bias_alone():
    model = small_model(router="token", router_balancing="loss_free", balance_warmup_steps=2)
    model.train()
    for _ in range(2):
        model(prompts(1, 24))
        model.model.recursion.update_bias()
    assert not model.model.recursion.bias.any()
    model(prompts(1, 24))
    model.model.recursion.update_bias()
    assert model.model.recursion.bias.any()


def test_documents_are_found_beside_a_mask_of_ones():
    model = small_model().eval()
    tokens, positions = prompts(1, 8), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        masked = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))
        plain = model(tokens, position_ids=positions)
    assert torch.equal(masked.logits, plain.logits)
    assert masked.past_key_values is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacities": [1.0, 0.5, 0.2], "router": "token"}, "only expert-choice has capacities"),
        ({"router_temperature": float("nan")}, "router_temperature: expected a positive"),
        ({"capacity_warmup_steps": -1}, "capacity_warmup_steps: expected at least 0"),
        ({"num_recursions": 4}, "num_recursions: 4 recursions must divide the 6 layers"),
        ({"num_recursions": 0}, "num_recursions: expected at least 1, got 0"),
        ({"num_recursions": 7}, "7 recursions must divide"),
        ({"sharing": "spiral"}, "sharing: expected one of"),
        ({"router": "magic"}, "router: expected one of"),
        ({"sharing": "middle_sequence"}, "middle_sequence has no recursion step"),
        ({"sharing": "sequence", "num_recursions": 5}, "sequence has no recursion step"),
        ({"num_recursion": 2}, "no option 'num_recursion'; did you mean 'num_recursions'"),
        ({"capacity": [1.0, 0.5, 0.2]}, "no option 'capacity'; did you mean 'capacities'"),
        ({"gating": "residual"}, "no option 'gating'; did you mean 'router_gating'"),
        ({"router_loss": 0.1}, "no option 'router_loss'; did you mean 'router'"),
        ({"foo_bar": 1}, "no option 'foo_bar', and LlamaConfig has none of that name either"),
        ({"capacities": [1.0, 0.5]}, "capacities: expected one for each of the 3"),
        ({"capacities": [0.5, 0.6, 0.1]}, "capacities: expected non-increasing values"),
        ({"capacities": [1.0, 0.5, 0.0]}, r"capacities: expected values in \(0, 1\]"),
        ({"capacities": [1.5, 0.5, 0.1]}, r"capacities: expected values in \(0, 1\]"),
        (
            {"capacities": [0.9, 0.5, 0.1], "kv_strategy": "shared"},
            "needs every token at the first",
        ),
        ({"router_func": "softmax"}, "softmax needs token-choice"),
        ({"router_type": "deep"}, "router_type: expected one of"),
        ({"router_temperature": 0.0}, "router_temperature: expected a positive"),
        ({"kv_strategy": "none"}, "kv_strategy: expected one of"),
        ({"eval_routing": "random"}, "eval_routing: expected one of"),
        ({"router_alpha": 0.0}, "router_alpha: expected a positive number, got 0.0"),
        ({"router_alpha": float("nan")}, "router_alpha: expected a positive number, got nan"),
        ({"router_aux_coef": -1.0}, "router_aux_coef: expected at least 0, got -1.0"),
        ({"router_gating": "additive", "router_aux": None}, "nothing would train the router"),
        (
            {"router": "token", "router_gating": "additive", "router_balancing": "loss_free"},
            "nothing would train the router",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MoRForCausalLM(small_config(**options))


def test_a_dense_configuration_says_what_to_write_instead():
    dense = small_config().base_config
    for kind in (MoRForCausalLM, MoRModel):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(MoRConfig\(base_config=config"):
            kind(dense)
    with pytest.raises(ValueError, match=r"base_config: expected the configuration .*got 'x'"):
        MoRConfig(base_config="x")


def test_what_other_tools_left_in_a_saved_configuration_is_kept(tmp_path):
    config = small_config()
    config.left_by_a_tool = 3
    config.save_pretrained(tmp_path)
    assert MoRConfig.from_pretrained(tmp_path).left_by_a_tool == 3
    assert MoRConfig(**config.to_dict()).left_by_a_tool == 3


def test_options_of_the_dense_model_and_of_transformers_are_taken():
    config = MoRConfig(num_hidden_layers=5, hidden_size=64, dtype="bfloat16", use_cache=False)
    assert (config.base_config.hidden_size, config.dtype) == (64, torch.bfloat16)
    assert MoRConfig(auto_map={}, quantization_config={}).num_hidden_layers == 32


def test_a_tokenizer_beside_a_model_loads_without_its_code(tmp_path):
    """AutoTokenizer reads config.json first, which names code for those without `import mor`."""
    small_model().save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    code = (
        "from transformers import AutoTokenizer as T\n"
        f"print(len(T.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def test_bad_inputs():
    model = small_model()
    tokens = prompts(2, 6)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    for columns in (4, 9):
        with pytest.raises(ValueError, match=f"attention_mask: expected 6 columns, got {columns}"):
            model(tokens, attention_mask=torch.ones(2, columns))
    with pytest.raises(ValueError, match=r"labels: expected shape \[1, 6\].*got \[1, 5\]"):
        model(prompts(1, 6), labels=prompts(1, 5))
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[2, 6\], got \[2, 5\]"):
        model(tokens, position_ids=torch.zeros(2, 5, dtype=torch.int64))
    falling = torch.tensor([[0, 1, 2, 3, 2, 1], [0, 1, 2, 3, 4, 5]])
    for mask in (None, torch.ones_like(tokens)):
        with pytest.raises(ValueError, match="position_ids: expected increasing positions"):
            model(tokens, position_ids=falling, attention_mask=mask)
    with pytest.raises(ValueError, match="cu_seqlens: expected integers"):
        model(tokens[:1], cu_seq_lens_q=torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match="cu_seqlens: expected one packed row"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing values from 0 to 6"):
        model(tokens[:1], cu_seq_lens_q=torch.tensor([0, 4, 3, 6], dtype=torch.int32))
    for wrong in (tokens[0], tokens.float(), tokens[:, :, None]):
        with pytest.raises(ValueError, match=r"input_ids: expected integers \[B, S\], got"):
            model(wrong)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected \[B, S, 64\], got \[2, 6, 31\]"):
        model(inputs_embeds=torch.zeros(2, 6, 31))
    vocab = model.config.vocab_size
    for token in (vocab, -1):
        with pytest.raises(ValueError, match=rf"expected tokens in \[0, {vocab}\), got {token}"):
            model(torch.full((1, 3), token))
    with pytest.raises(ValueError, match="attn_implementation='mor'"):
        MoRForCausalLM._from_config(small_config(), attn_implementation="sdpa")


def test_nan_in_scores_is_an_error():
    model = small_model().train()
    with torch.no_grad():
        model.model.recursion.routers[1].layers[0].weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"route_topk.*NaN"):
        model(prompts(1, 8))
    with pytest.raises(RuntimeError, match="ExpertChoice: expected router scores without NaN"):
        model.eval()(prompts(1, 8))
    model = small_model(router="token").train()
    with torch.no_grad():
        model.model.recursion.router.layers[0].weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="TokenChoice: expected router scores without NaN"):
        model(prompts(1, 8))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (GemmaConfig(num_hidden_layers=9), "expected an architecture of"),
        (
            Gemma3TextConfig(num_hidden_layers=8, attn_logit_softcapping=50.0),
            "attn_logit_softcapping is not supported, got 50.0",
        ),
        (
            Gemma3TextConfig(num_hidden_layers=8, final_logit_softcapping=30.0),
            "final_logit_softcapping is not supported, got 30.0",
        ),
        (
            Gemma3TextConfig(num_hidden_layers=8, use_bidirectional_attention=True),
            "use_bidirectional_attention is not supported",
        ),
        (Gemma2Config(num_hidden_layers=8), "expected an architecture of"),
        (LlamaConfig(num_hidden_layers=8, attention_dropout=0.1), "attention_dropout is not"),
    ],
    ids=["gemma", "capped", "capped-logits", "bidirectional", "gemma2", "dropout"],
)
def test_dense_models_that_cannot_be_used(base, message):
    with pytest.raises(ValueError, match=f"MoRConfig.base_config: {message}"):
        MoRForCausalLM(MoRConfig(base_config=base))


def test_empty_rows_of_a_batch():
    """A row of pads only changes nothing for the others."""
    model = small_model().eval()
    tokens = prompts(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    with torch.no_grad():
        out = model(tokens, attention_mask=mask)
        alone = model(tokens[:1])
    torch.testing.assert_close(out.logits[:1], alone.logits)
    assert out.logits.isfinite().all()
    with pytest.raises(ValueError, match="a batch of pads only"):
        model(tokens, attention_mask=torch.zeros_like(tokens))


def test_routing_metrics():
    model = small_model().train()
    assert model.routing_metrics.compute() == {}
    model(prompts(2, 24))
    metrics = model.routing_metrics.compute()
    assert metrics["selected_share_1"] == 1.0
    assert metrics["selected_share_2"] == pytest.approx(16 / 24)
    assert metrics["selected_share_3"] == pytest.approx(8 / 24)
    assert 0 <= metrics["sampling_accuracy"] <= 1
    assert 0 <= metrics["dead_tokens"] <= 1
    model.routing_metrics.reset()
    assert model.routing_metrics.compute() == {}
    model = small_model(router="token").train()
    depths = model(prompts(2, 24)).token_depths
    metrics = model.routing_metrics.compute()
    loads = torch.bincount(depths.flatten() - 1, minlength=3).double()
    assert metrics["max_vio"] == pytest.approx(float((loads.max() - 16) / 16))
    assert metrics["selected_share_1"] == 1.0
    assert metrics["selected_share_3"] == pytest.approx(float(loads[2]) / 48)
