"""The `mor` command: what it does with good input, and one sentence for each kind of bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mor
from mor.options import RunOptions
from mor_cli.commands import app

SHORT = (
    "--seq-len 16 --batch-size 4 --steps 4 --log-every 1 --eval-every 2 --eval-rows 4 "
    "--save-every 2 --report-to none --no-progress"
).split()
TINY = [*"--layers 5 --hidden-size 32 --heads 2 --vocab-size 300".split(), *SHORT]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {n} of {n * n % 97} and {n % 13}" for n in range(200)))
    return path


def _mor(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def _train(text: Path, output_dir: Path, *options: object) -> tuple[int, str, str]:
    named = {"--model", "--config", "--tokenizer"}.intersection(options)
    sizes = {"--config": ["--vocab-size", 300], "--tokenizer": TINY[:6]}  # those that are not given
    own = [*SHORT, *(sizes.get(named.pop(), []) if len(named) == 1 else [])] if named else TINY
    return _mor("train", "--data", text, "--output-dir", output_dir, *own, *options)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    code, output, _ = _train(text, folder)
    assert code == 0
    assert str(folder / "model") in output
    return folder


# What it does


def test_help_names_every_command():
    code, output, _ = _mor("--help")
    assert code == 0
    for command in ("train", "generate", "look", "convert", "demo", "info"):
        assert command in output


def test_every_option_of_a_run_is_an_option_of_train_with_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, output, _ = _mor("train", "--help")
    for field in fields(RunOptions):
        assert "--" + field.name.replace("_", "-") in output
    text = " ".join(output.replace("│", " ").split())
    assert "Default: the Python standard library's own sources." in text


def test_info_of_the_module_names_what_a_bug_report_needs():
    result = subprocess.run(
        [sys.executable, "-m", "mor", "info"], capture_output=True, text=True, check=True
    )
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert values["mor"] == mor.__version__
    assert values["torch"] == torch.__version__
    assert values["instruction set"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    architectures = torch.ops.mor.cuda_architectures()
    assert values["CUDA operators"] == (
        f"yes, for {architectures}" if architectures else "no (no nvcc, or MOR_CUDA=OFF)"
    )
    assert {"python", "transformers", "compiler", "torch's CUDA"} <= values.keys()


def test_train_writes_a_model_that_transformers_loads(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert isinstance(model, mor.MoRForCausalLM)
    assert model.config.capacities == pytest.approx([1, 2 / 3, 1 / 3])
    assert (run / "checkpoint-4" / "trainer_state.json").exists()
    assert json.loads((run / "run.json").read_text())["options"]["vocab_size"] == 300


def test_generate_continues_the_prompt_the_same_way_for_one_seed(run):
    outputs = [
        _mor("generate", folder, "line 1", "--max-new-tokens", 5, "--seed", seed)
        for folder, seed in ((run, 0), (run / "model", 0), (run, 1))
    ]
    assert [code for code, _, _ in outputs] == [0, 0, 0]
    assert outputs[0][1].startswith("line 1")
    assert outputs[0][1] == outputs[1][1] != outputs[2][1]
    greedy = [_mor("generate", run, "", "--temperature", 0, "--seed", s)[1] for s in (0, 1)]
    assert greedy[0] == greedy[1] != ""


def test_resume_takes_the_options_of_the_run(text, tmp_path):
    assert _train(text, tmp_path)[0] == 0
    code, output, _ = _mor("train", "--resume", "--output-dir", tmp_path, "--steps", 6)
    assert code == 0
    assert f"Resuming from {tmp_path / 'checkpoint-4'}" in output
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    steps = [line["step"] for line in state["log_history"] if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run.json").read_text())["options"]["steps"] == 6


def test_resume_after_the_last_step_trains_no_more(text, tmp_path):
    _train(text, tmp_path)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    for steps in (4, 3):
        code, _, _ = _mor("train", "--resume", "--output-dir", tmp_path, "--steps", steps)
        assert code == 0
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "checkpoint-5").exists()


def test_resume_from_takes_the_options_of_its_run(text, tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(text.parent)
        _train(Path(text.name), tmp_path / "first", "--steps", 2)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    for folder in ("first", "second"):
        options = ("--output-dir", tmp_path / folder, "--steps", 3)
        assert _mor("train", "--resume-from", checkpoint, *options)[0] == 0
        written = json.loads((tmp_path / folder / "run.json").read_text())["options"]
        assert (written["data"], written["hidden_size"], written["steps"]) == (str(text), 32, 3)


@pytest.mark.parametrize(
    "options",
    [
        ["--router", "token"],
        ["--router", "none"],
        ["--capacities", "1,1/2,0.25", "--separate-documents"],
        ["--schedule", "cosine", "--kv-heads", "1", "--gradient-accumulation", "2"],
        ["--bf16", "--gradient-checkpointing"],
    ],
    ids=" ".join,
)
def test_train_with(text, tmp_path, options):
    code, _, _ = _train(text, tmp_path, *options, "--steps", 2, "--save-every", 0)
    assert code == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_config_of_a_dense_model_is_made_recursive(text, tmp_path):
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320}
    path.write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    options = ["--config", path, "--num-recursions", 2, "--steps", 1]
    assert _train(text, tmp_path / "run", *options)[0] == 0
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["num_recursions"] == 2
    assert saved["base_config"]["hidden_size"] == 16
    # And the configuration that was saved is a configuration to train from.
    options = ["--config", tmp_path / "run" / "model" / "config.json", "--steps", 1]
    assert _train(text, tmp_path / "again", *options)[0] == 0
    again = json.loads((tmp_path / "again" / "model" / "config.json").read_text())
    assert again["capacities"] == saved["capacities"]


def test_a_model_is_trained_further(run, text, tmp_path):
    code, output, _ = _train(text, tmp_path, "--model", run / "model", "--lr", 1e-12, "--steps", 1)
    assert code == 0
    assert re.search(r"^step 1: loss [\d.]+, .*lm_loss", output, re.MULTILINE)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (run, tmp_path)
    )
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-6, rtol=0)
    ours, other = (folder / "model" / "tokenizer.json" for folder in (tmp_path, run))
    assert json.loads(ours.read_text())["model"] == json.loads(other.read_text())["model"]


def test_resuming_misses_no_weight(text, tmp_path, caplog):
    """A tied head is in no checkpoint, and the Trainer said so at every resume."""
    assert _train(text, tmp_path)[0] == 0
    assert _mor("train", "--resume", "--output-dir", tmp_path, "--steps", 5)[0] == 0
    assert "missing keys" not in caplog.text


def test_auxiliary_routers_have_a_rate_of_their_own(text, tmp_path):
    base = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 300}
    base |= {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = mor.MoRConfig(base_config=base, router_aux="router")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    options = ["--config", path, "--aux-router-lr", 0.5, "--lr", 1e-3, "--log-every", 1]
    assert _train(text, tmp_path / "run", *options, "--warmup-share", 0)[0] == 0
    states = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert sorted({group["initial_lr"] for group in states["param_groups"]}) == [1e-3, 0.5]


def test_tokenizer_of_another_run_is_used(run, text, tmp_path):
    code, _, _ = _train(text, tmp_path, "--tokenizer", run / "model", "--steps", 1)
    assert code == 0
    ours, other = (folder / "model" / "tokenizer.json" for folder in (tmp_path, run))
    assert json.loads(ours.read_text())["model"] == json.loads(other.read_text())["model"]


# What it refuses: one sentence, exit code 2


def _refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, errors = result
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("mor: ")
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--capacities", "1,0.5,0.7"], ["capacities"]),
        (["--capacities", "1,0.5,0"], ["capacities"]),
        (["--capacities", "1,a,b"], ["expected capacities such as 1,2/3,1/3", "1,a,b"]),
        (
            ["--layers", "6"],
            ["--num-recursions: 3 recursions", "use", "1, 2 or 4", "--layers 5 or 8"],
        ),
        (["--layers", "2"], ["--num-recursions", "--layers 5"]),
        (["--num-recursions", "0"], ["--num-recursions must be at least 1"]),
        (["--gating", "half"], ["--gating: expected one of", "'residual'", "got 'half'"]),
        (["--router-type", "huge"], ["--router-type: expected one of", "wide_mlp"]),
        (["--kv-strategy", "x"], ["--kv-strategy: expected one of"]),
        (["--relaxation-rank", "4"], ["--relaxation-rank would be ignored", "--relaxation"]),
        (["--sharing", "spiral"], ["sharing", "spiral"]),
        (["--heads", "3"], ["--hidden-size 32", "--heads 3"]),
        (["--kv-heads", "3"], ["--heads", "--kv-heads", "3"]),
        (["--seq-len", "1"], ["--seq-len must be at least 2"]),
        (["--lr", "0"], ["--lr must be a positive number"]),
        (["--lr", "nan"], ["--lr must be a positive number"]),
        (["--warmup-share", "0.9"], ["--warmup-share", "--decay-share"]),
        (["--data-split", "test"], ["--data-split would be ignored", "no Hugging Face dataset"]),
        (["--report-to", "wandb"], ["--report-to wandb", "pip install wandb"]),
        (["--report-to", "paper"], ["--report-to paper", "not supported"]),
        (["--output-dir", "/proc/foo"], ["--output-dir /proc/foo"]),
        (["--seq-len", "100000"], ["corpus too short", "100000"]),
        (["--vocab-size", "100"], ["vocab_size", "257"]),
        (["--steps", "0"], ["steps must be at least 1"]),
        (["--max-tokens", "-3"], ["--max-tokens must be at least 1", "-3"]),
        (["--eval-rows", "0"], ["--eval-rows must be at least 1"]),
        (["--weight-decay", "-1"], ["--weight-decay must be at least 0"]),
        (["--tokenizer", "tests"], ["cannot load a tokenizer from 'tests'", "serialization file"]),
        (["--tokenizer", "./nowhere"], ["cannot load a tokenizer", "nowhere"]),
        (["--config", "nowhere.json"], ["cannot read nowhere.json"]),
        (["--resume-from", "nowhere"], ["cannot resume from nowhere"]),
    ],
    ids=lambda value: "" if value and " " in value[0] else " ".join(value),
)
def test_bad_option_is_one_sentence(text, tmp_path, options, words):
    _refused(_train(text, tmp_path, *options), *words)
    assert not (tmp_path / "model").exists()


def test_resuming_what_is_no_run_is_one_sentence(text, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    _refused(_train(text, tmp_path, "--resume"), "run.json", "no record of a run")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xff", ["a.txt", "not UTF-8"]),
        ("a.txt", b"", ["empty corpus", "a.txt"]),
        ("a.jsonl", b'{"body": "x"}', ["no text field 'text'", "a.jsonl", "body"]),
        ("a.parquet", b"no", ["cannot read", "a.parquet"]),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    _refused(_train(tmp_path / name, tmp_path / "run"), *words)


def test_missing_data_is_one_sentence(tmp_path):
    _refused(_train(tmp_path / "none.txt", tmp_path / "run"), "no such file", "none.txt")


def test_run_in_the_way_is_one_sentence(run, text):
    _refused(_train(text, run), "already holds checkpoint-", "--resume")


def test_corrupt_checkpoint_is_one_sentence(text, tmp_path):
    assert _train(text, tmp_path)[0] == 0
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    named = ["--resume-from", tmp_path / "checkpoint-4"]
    _refused(_train(text, tmp_path, *named), "model.safetensors is damaged")


def test_config_that_is_not_json_or_too_small_is_one_sentence(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    _refused(_train(text, tmp_path / "run", "--config", path), "config.json", "not JSON")
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 10, "num_hidden_layers": 5}))
    _refused(_train(text, tmp_path / "run", "--config", path), "vocab_size of 10", "300")


def test_a_model_to_train_further_must_be_one(run, text, tmp_path):
    _refused(_train(text, tmp_path, "--model", tmp_path), "config.json")
    base = {"model_type": "llama", "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(base))
    tokenizer = ["--tokenizer", run / "model"]
    _refused(_train(text, tmp_path, "--model", tmp_path, *tokenizer), "holds no MoR model", "llama")
    options = ["--model", run / "model", "--router", "token"]
    _refused(_train(text, tmp_path, *options), "--router would be ignored", "--model")


def test_generate_from_what_is_no_model(run, tmp_path):
    _refused(_mor("generate", tmp_path, "x"), "no model in", "config.json is missing")
    file = run / "model" / "config.json"
    _refused(_mor("generate", file, "x"), "expected the folder", str(file.parent))
    for path in (run / "model").iterdir():
        if path.name != "model.safetensors":
            os.symlink(path, tmp_path / path.name)
    weights = (run / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-8])
    _refused(_mor("generate", tmp_path, "x"), "cannot load the model in")


def test_traceback_on_request(text, tmp_path, monkeypatch):
    monkeypatch.setenv("MOR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        _train(text, tmp_path, "--steps", 0)
