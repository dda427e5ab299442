"""Checkpoints of the authors: their fixtures, and directories made here in the same format.

Over 300 lines in one file: most tests change a directory that the writer of the format here makes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mor
from mor import MoRConfig, MoRForCausalLM
from mor.cli import app
from mor.models.authors_options import mor_options

ORACLE = Path(os.environ.get("MOR_ORACLE", Path(__file__).parents[2] / ".." / "shared" / "oracle"))
FIXTURES = ORACLE / "checkpoints"
CASES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not (FIXTURES / name).is_dir(), reason=f"no {name} in {FIXTURES} (set MOR_ORACLE)"
        ),
    )
    for name in (
        "vanilla",
        "rec3_middle_sequence",
        "mor_expert_rec3",
        "mor_expert_rec3_deduplicated",
        "mor_expert_rec3_kv_share",
        "mor_token_rec3",
    )
]
LOGITS = 1e-5


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_authors_code(name: str, tmp_path: Path):
    want = load_file(FIXTURES / name / "expected.safetensors")
    model = mor.load_authors_checkpoint(FIXTURES / name, eval_routing="topk")
    assert not model.training
    torch.testing.assert_close(
        logits_of(model, want["input_ids"]), want["logits"], rtol=0, atol=LOGITS
    )
    model.save_pretrained(tmp_path)
    kind = type(model)
    assert kind is (LlamaForCausalLM if name == "vanilla" else MoRForCausalLM)
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(
        logits_of(again, want["input_ids"]), want["logits"], rtol=0, atol=LOGITS
    )


@pytest.mark.parametrize("name", CASES)
def test_generates_and_trains(name: str):
    model = mor.load_authors_checkpoint(FIXTURES / name)
    prompt = torch.arange(1, 9).unsqueeze(0)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=prompt, labels=prompt).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [c for c in CASES if "expert" in c.values[0]])
def test_expert_choice_is_causal_unless_asked_for_topk(name: str):
    model = mor.load_authors_checkpoint(FIXTURES / name)
    tokens = load_file(FIXTURES / name / "expected.safetensors")["input_ids"][:1]
    assert model.config.eval_routing == "threshold"
    whole, part = logits_of(model, tokens), logits_of(model, tokens[:, :7])
    torch.testing.assert_close(whole[:, :7], part, rtol=0, atol=LOGITS)


@pytest.mark.skipif(not (FIXTURES / "mor_expert_rec3_untied").is_dir(), reason="no fixtures")
def test_untied_recursions_are_refused_by_name():
    with pytest.raises(ValueError, match="weight tying") as error:
        mor.load_authors_checkpoint(FIXTURES / "mor_expert_rec3_untied")
    for r in (2, 3):
        for j in (0, 1):
            for p in "qkvo":
                assert f"model.layers.{r}.block.{j}.self_attn.{p}_proj.weight" in str(error.value)
    assert "mlp" not in str(error.value)


# Directories made here: the reverse mapping is written out, so it shares nothing with the loader.

TYPES = {
    "expert": {"mor": {"enable": True, "type": "expert", "expert": {"sampling": "aux_loss"}}},
    "token": {"mor": {"enable": True, "type": "token", "token": {"balancing": "loss"}}},
    "recursive": {},
}


def merged(options: dict, changes: dict) -> dict:
    for key, value in changes.items():
        if isinstance(value, dict):
            merged(options.setdefault(key, {}), value)
        else:
            options[key] = value
    return options


def authors_options(kind: str, **changes) -> dict:
    options = {
        "name": "run",
        "precision": "fp32",
        "recursive": {"enable": True, "num_recursion": 2, "sharing": "middle_cycle"},
        "kv_sharing": {"enable": False},
        "relaxation": {"enable": False},
        "mor": {
            "enable": False,
            "router_type": "linear",
            "expert": {"router_func": "sigmoid", "alpha": 0.1},
            "token": {"router_func": "softmax", "alpha": 1.0},
        },
    }
    return merged(merged(options, TYPES[kind]), changes)


def authors_state(model: MoRForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict that the authors' code would have saved for the weights of `model`."""
    config, ours = model.config, model.state_dict()
    state = {"model.embed_tokens.weight": ours["model.embed_tokens.weight"]}
    ends = 1 if config.sharing.startswith("middle") else 0
    block = config.block_depth

    def put(prefix: str, unique: int) -> None:
        start = f"model.layers.{unique}."
        for name, tensor in ours.items():
            if name.startswith(start):
                state[f"{prefix}.{name.removeprefix(start)}"] = tensor.clone()

    def put_router(prefix: str, start: str) -> None:
        weights = [f"{start}.layers.{i}.weight" for i in (0, 1)]
        if config.router_type == "linear":
            state[f"{prefix}.router.weight"] = ours[weights[0]]
        elif config.router_type == "mlp":
            state[f"{prefix}.router.0.weight"] = ours[weights[0]]
            state[f"{prefix}.router.2.weight"] = ours[weights[1]]

    if ends:
        put("model.layers.0", 0)
    if config.router is None:
        for depth, unique in enumerate(config.layer_schedule):
            put(f"model.layers.{depth}", unique)
        last = config.num_hidden_layers - 1
    elif config.router == "expert":
        for r in range(config.num_recursions):
            for j in range(block):
                put(f"model.layers.{ends + r}.block.{j}", ends + j)
            put_router(f"model.layers.{ends + r}.mor_router", f"model.recursion.routers.{r}")
            if config.router_aux == "router":
                put_router(
                    f"model.layers.{ends + r}.mlp_router", f"model.recursion.aux_routers.{r}"
                )
        last = ends + config.num_recursions
    else:
        for r in range(config.num_recursions):
            for j in range(block):
                put(f"model.layers.1.block_list.{r}.{j}", ends + j)
        put_router("model.layers.1.mor_router", "model.recursion.router")
        if config.router_balancing == "loss_free":
            state["model.layers.1.router_bias"] = ours["model.recursion.bias"]
        last = 2
    if ends:
        put(f"model.layers.{last}", config.num_unique_layers - 1)
    state["model.norm.weight"] = ours["model.norm.weight"]
    state["lm_head.weight"] = ours["lm_head.weight"].clone()
    return state


def make(folder: Path, kind: str = "expert", **changes) -> MoRForCausalLM:
    """Writes a random model as the authors would; returns it."""
    options = authors_options(kind, **changes)
    base = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6 if options["recursive"]["sharing"].startswith("middle") else 4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=kind != "recursive",
    )
    torch.manual_seed(0)
    model = MoRForCausalLM(MoRConfig(base_config=base, **mor_options(options))).eval()
    if model.config.router_balancing == "loss_free" and kind == "token":
        model.model.recursion.bias.copy_(torch.tensor([0.25, -0.25]))
    values = base.to_dict() | {"architectures": ["MoRLlamaForCausalLM"]}
    values["tie_word_embeddings"] = True  # what the authors' code writes for all of its models
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    torch.save(authors_state(model), folder / "pytorch_model.bin")
    return model


def rewrite(folder: Path, change) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def rewrite_json(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def same(got, want: MoRForCausalLM) -> None:
    state = got.state_dict()
    assert list(state) == list(want.state_dict())
    for name, tensor in want.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for option in MoRConfig.__annotations__.keys() - {"base_config"}:
        assert getattr(got.config, option, None) == getattr(want.config, option, None), option
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(logits_of(got, tokens), logits_of(want, tokens))


VARIANTS = {
    "linear": ("expert", {}),
    "mlp": ("expert", {"mor": {"router_type": "mlp"}}),
    "wide_mlp": ("expert", {"mor": {"router_type": "wide_mlp"}}),  # as wide as mlp in their code
    "aux_router": ("expert", {"mor": {"temp": 1.5, "expert": {"sampling": "aux_router"}}}),
    "aux_mlp": ("expert", {"mor": {"router_type": "mlp", "expert": {"sampling": "aux_router"}}}),
    "capacity": ("expert", {"mor": {"capacity": "0.9,0.3", "expert": {"router_func": "tanh"}}}),
    "no function": ("expert", {"mor": {"expert": {"router_func": None, "alpha": 0.3}}}),
    "cycle": ("expert", {"recursive": {"sharing": "cycle"}}),
    "hybrid": ("expert", {"kv_sharing": {"enable": True, "update_cache": True}}),
    "random": ("expert", {"mor": {"rand_router": True}}),
    "token": ("token", {"mor": {"z_loss": True, "z_coeff": "1e-5"}}),
    "loss_free": ("token", {"mor": {"token": {"balancing": "loss_free"}}}),
    "token mlp": ("token", {"mor": {"router_type": "mlp", "token": {"router_func": "sigmoid"}}}),
    "sequence": ("recursive", {"recursive": {"sharing": "sequence"}}),
    "shared": ("recursive", {"kv_sharing": {"enable": True}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, tmp_path: Path):
    kind, changes = VARIANTS[variant]
    model = make(tmp_path / "theirs", kind, **changes)
    loaded = mor.load_authors_checkpoint(tmp_path / "theirs")
    same(loaded, model)
    loaded.save_pretrained(tmp_path / "ours")
    same(MoRForCausalLM.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("variant", ["linear", "aux_router", "aux_mlp", "capacity", "hybrid"])
def test_topk_evaluation_ranks_by_the_main_router(variant: str, tmp_path: Path):
    """As training, and as their evaluation: neither asks the auxiliary router."""
    kind, changes = VARIANTS[variant]
    make(tmp_path, kind, **changes)
    model = mor.load_authors_checkpoint(tmp_path, eval_routing="topk")
    tokens = torch.arange(40).view(2, 20)
    evaluated = logits_of(model, tokens)
    torch.testing.assert_close(evaluated, logits_of(model.train(), tokens), rtol=0, atol=LOGITS)


def test_scores_without_function_are_not_scaled():
    options = authors_options("expert", mor={"expert": {"router_func": None, "alpha": 0.3}})
    assert mor_options(options)["router_alpha"] == 1.0


def test_one_recursion_is_a_plain_llama_with_a_head_of_its_own(tmp_path: Path):
    make(tmp_path, "recursive")
    options = authors_options("recursive", recursive={"num_recursion": 1, "base_depth": 6})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    model = mor.load_authors_checkpoint(tmp_path)
    assert type(model) is LlamaForCausalLM
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kept", ["first", "last"])
def test_files_without_duplicates(kept: str, tmp_path: Path):
    """Which copy stays is up to who removed them: safetensors keeps the first in the alphabet."""
    model = make(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    drop = 2 if kept == "first" else 1
    state = {n: t for n, t in state.items() if not n.startswith(f"model.layers.{drop}.block.")}
    del state["lm_head.weight" if kept == "first" else "model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors")
    same(mor.load_authors_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_files(name: str, tmp_path: Path):
    model = make(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    stem, suffix = name.split(".")
    names = sorted(state)
    parts = {n: f"{stem}-{1 + i % 2:05}-of-00002.{suffix}" for i, n in enumerate(names)}
    for file in set(parts.values()):
        part = {n: state[n] for n in names if parts[n] == file}
        save_file(part, tmp_path / file) if suffix == "safetensors" else torch.save(
            part, tmp_path / file
        )
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    same(mor.load_authors_checkpoint(tmp_path), model)
    index.write_text(json.dumps({"weight_map": parts | {"model.norm.bias": parts[names[0]]}}))
    with pytest.raises(ValueError, match=r"model\.norm\.bias .*none of its files"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / parts[names[0]]).unlink()
    with pytest.raises(ValueError, match=r"lacks .*00001-of-00002"):
        mor.load_authors_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        mor.load_authors_checkpoint(tmp_path)


def test_bfloat16_stays_and_can_be_changed(tmp_path: Path):
    make(tmp_path, "token", mor={"token": {"balancing": "loss_free"}})
    rewrite(tmp_path, lambda state: state.update({n: t.bfloat16() for n, t in state.items()}))
    model = mor.load_authors_checkpoint(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.model.recursion.bias.dtype == torch.float32
    assert mor.load_authors_checkpoint(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_loaded_model_does_not_read_its_file_again(tmp_path: Path):
    model = make(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(state, tmp_path / "model.safetensors")
    loaded = mor.load_authors_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    same(loaded, model)


def test_tensors_without_a_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda state: state.update({name: torch.ones(4)}))
    mor.load_authors_checkpoint(tmp_path)
    assert f"{name} is not used: rotary frequencies" in caplog.text


BLOCK = "model.layers.2.block.0.mlp.up_proj.weight"
BAD_STATES = {
    "missing": (lambda s: s.pop("model.norm.weight"), r"missing model\.norm\.weight"),
    "router": (lambda s: s.pop("model.layers.2.mor_router.router.weight"), "missing .*mor_router"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
    "shape": (lambda s: s.update({BLOCK: torch.ones(3, 2)}), r"another shape .*up_proj.*\[3, 2\]"),
    "integers": (lambda s: s.update({BLOCK: s[BLOCK].to(torch.int8)}), "shape .*up_proj.*int8"),
    "untied": (lambda s: s[BLOCK].add_(1), f"{BLOCK} in .* differ from their copies"),
    "head": (lambda s: s["lm_head.weight"].add_(1), "lm_head.weight differs .*tie_word_embeddings"),
    "no state dict": (lambda s: s.update(step=3), "expected a state dict"),
}


@pytest.mark.parametrize("fault", BAD_STATES)
def test_weights_that_do_not_fit_are_named(fault: str, tmp_path: Path):
    make(tmp_path)
    change, message = BAD_STATES[fault]
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        mor.load_authors_checkpoint(tmp_path)


def test_a_lost_copy_among_three_is_damage_not_deduplication(tmp_path: Path):
    make(tmp_path, recursive={"num_recursion": 4})
    rewrite(tmp_path, lambda state: state.pop("model.layers.3.block.0.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"missing model\.layers\.3\.block\.0\.mlp\.up_proj\.weight"
    ):
        mor.load_authors_checkpoint(tmp_path)


def test_an_untied_head_of_a_routed_model(tmp_path: Path):
    make(tmp_path)
    rewrite(tmp_path, lambda state: state["lm_head.weight"].add_(1))
    rewrite_json(tmp_path, tie_word_embeddings=False)
    model = mor.load_authors_checkpoint(tmp_path)
    weights = model.lm_head.weight - model.model.embed_tokens.weight
    torch.testing.assert_close(weights, torch.ones_like(weights))


BAD_OPTIONS = {
    "unknown option": ({"mor": {"depth_bias": 1}}, r"unknown mor\.depth_bias"),
    "of the router": ({"mor": {"expert": {"noise": 1}}}, r"unknown mor\.expert\.noise"),
    "of sharing": ({"recursive": {"skip": 1}}, r"unknown recursive\.skip"),
    "unknown section": ({"early_exit": {"enable": True}}, "unknown early_exit"),
    "relaxation": ({"relaxation": {"enable": True}}, r"relaxation\.enable"),
    "own norms": ({"recursive": {"ln_share": False}}, r"recursive\.ln_share"),
    "type": ({"mor": {"type": "both"}}, r"mor\.type: expected one of expert, token, got 'both'"),
    "gating": ({"mor": {"expert": {"gating": "soft"}}}, r"mor\.expert\.gating"),
    "alpha": ({"mor": {"expert": {"alpha": "big"}}}, r"mor\.expert\.alpha: expected a number"),
    "capacity": ({"mor": {"capacity": "1,0.5,0.2"}}, r"mor\.capacity: expected null or 2"),
    "sharing": ({"recursive": {"sharing": "spiral"}}, r"recursive\.sharing"),
    "recursions": ({"recursive": {"num_recursion": None}}, r"recursive\.num_recursion"),
    "depth": ({"recursive": {"num_recursion": 3}}, "num_recursions: 3 .*must divide"),
    "no section": ({"mor": {"expert": 3}}, r"mor\.expert: expected a section"),
    "no sections": ({"recursive": 3}, "recursive: expected a section"),
    "no sizes": ({"model_config": "smollm"}, "model_config: expected a section"),
    "flag": ({"mor": {"enable": "yes"}}, r"mor\.enable: expected one of true, false"),
    "router alone": ({"recursive": {"enable": False}}, r"mor\.enable: expected false where"),
    "another run": ({"model_config": {"rms_norm_eps": 1.0}}, r"model_config\.rms_norm_eps"),
    "another sharing": ({"recursive": {"sharing": "cycle"}}, "missing"),
}


@pytest.mark.parametrize("fault", BAD_OPTIONS)
def test_options_that_no_model_has_are_refused_by_name(fault: str, tmp_path: Path):
    make(tmp_path)
    changes, message = BAD_OPTIONS[fault]
    options = yaml.safe_load((tmp_path / "run.yaml").read_text())
    merged(options, changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(ValueError, match=message):
        mor.load_authors_checkpoint(tmp_path)


def test_options_file_is_found_or_named(tmp_path: Path):
    model = make(tmp_path)
    (tmp_path / "notes.yaml").write_text("author: nobody\n")
    same(mor.load_authors_checkpoint(tmp_path), model)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"expected one YAML file .*other\.yaml, run\.yaml"):
        mor.load_authors_checkpoint(tmp_path)
    same(mor.load_authors_checkpoint(tmp_path, tmp_path / "other.yaml"), model)
    with pytest.raises(ValueError, match="has no section 'recursive'"):
        mor.load_authors_checkpoint(tmp_path, tmp_path / "notes.yaml")
    with pytest.raises(ValueError, match="no file"):
        mor.load_authors_checkpoint(tmp_path, tmp_path / "absent.yaml")
    (tmp_path / "other.yaml").unlink()
    (tmp_path / "run.yaml").write_text(text + "\n  : [")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / "run.yaml").unlink()
    with pytest.raises(ValueError, match="got none; name the file"):
        mor.load_authors_checkpoint(tmp_path)


def test_directories_that_are_not_whole(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a directory"):
        mor.load_authors_checkpoint(tmp_path / "nowhere")
    make(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights"):
        mor.load_authors_checkpoint(tmp_path)
    rewrite_json(tmp_path, num_attention_heads="two")
    with pytest.raises(ValueError, match=r"config\.json: .*num_attention_heads"):
        mor.load_authors_checkpoint(tmp_path)
    rewrite_json(tmp_path, model_type="gpt2")
    with pytest.raises(ValueError, match="expected model_type 'llama', got 'gpt2'"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        mor.load_authors_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        mor.load_authors_checkpoint(tmp_path)


class Trap:
    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    make(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read"):
        mor.load_authors_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


def convert(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert_recognises_a_checkpoint_of_the_authors(tmp_path: Path):
    model = make(tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    assert "training" not in result.output
    same(MoRForCausalLM.from_pretrained(tmp_path / "ours"), model)
    options = (tmp_path / "theirs" / "run.yaml").rename(tmp_path / "run.yaml")
    # Without its options it would be taken for a dense Llama whose layers are missing.
    result = convert(tmp_path / "theirs", tmp_path / "none")
    assert result.exit_code == 2
    assert "--authors-config" in result.output
    out = tmp_path / "half"
    result = convert(tmp_path / "theirs", out, "--authors-config", options, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert MoRForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_convert_refuses_options_that_a_checkpoint_of_the_authors_has_itself(tmp_path: Path):
    make(tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours", "--num-recursions", "3", "--seed", "1")
    assert result.exit_code == 2
    assert "leave out --num-recursions, --seed" in result.output
    assert not (tmp_path / "ours").exists()


def test_convert_takes_a_dense_model_beside_other_yaml_for_dense(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "recipe.yaml").write_text("recipe: 1\n")
    result = convert(tmp_path / "dense", tmp_path / "out", "--num-recursions", "3")
    assert result.exit_code == 0, result.output
    assert MoRForCausalLM.from_pretrained(tmp_path / "out").config.num_recursions == 3


BIG = """
import resource, sys, time, mor
start = time.perf_counter()
mor.load_authors_checkpoint(sys.argv[1]).save_pretrained(sys.argv[2])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_model_of_360M_converts_in_20_seconds_and_4_GiB(tmp_path: Path):
    options = authors_options("expert", recursive={"num_recursion": 4})
    base = LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=34,
        num_attention_heads=15,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "theirs"
    folder.mkdir()
    model = MoRForCausalLM(MoRConfig(base_config=base, **mor_options(options)))
    torch.save(authors_state(model), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(base.to_dict()))
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-c", BIG, str(folder), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < 20
    assert peak < 4
