"""The `mor` command: what it does with good input, and one sentence for each kind of bad input.

Over 300 lines in one file: all tests share one finished run.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import mor
from mor.cli import app
from mor.training import MoRTrainer
from mor.training.generate import continue_text, find_model, load_model
from mor.training.options import RunOptions

SHORT = (
    "--seq-len 16 --batch-size 4 --steps 4 --log-every 1 --eval-every 2 --eval-rows 4 "
    "--save-every 2 --report-to none --no-progress"
).split()
TINY = [*"--layers 5 --hidden-size 32 --heads 2 --vocab-size 300".split(), *SHORT]


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("cli")]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {n} of {n * n % 97} and {n % 13}" for n in range(200)))
    return path


def _mor(*arguments: object, input: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
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
        assert "--" + field.name.replace("_", "-") in output or field.name == "training_arguments"
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


def test_header_says_what_is_about_to_run(text, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines())
        + '{"text": null}\n'
    )
    for name in ("b.csv", "c.csv", "README"):
        (folder / name).write_text("not read")
    code, output, _ = _train(folder, tmp_path / "run", "--steps", 2, "--lr", 1e-4)
    assert code == 0
    header = output[: output.index("step 1:")].splitlines()
    assert header[0].startswith("Loading PyTorch")
    assert "1 file, 3 not read (2 .csv, 1 without ending)" in header[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert "5 layers deep with the weights of 3, 3 recursions, expert-choice" in header[2]
    assert f"{millions:.2f}M parameters" in header[2]
    assert "of 200 documents; 1 without text left out" in header[3]
    assert "2 of 64 tokens (4 rows of 16): 128 tokens" in header[4]
    assert "learning rate 0.0001" in header[4]
    assert "float32" in header[5]


def test_train_takes_every_option_of_convert_that_routes(text, tmp_path):
    options = ["--gating", "residual", "--router-type", "mlp", "--recursion-encoding"]
    assert _train(text, tmp_path, *options, "--steps", 1)[0] == 0
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (saved["router_gating"], saved["router_type"]) == ("residual", "mlp")
    assert saved["recursion_encoding"] is True


def test_train_with_adapters(text, tmp_path):
    pytest.importorskip("peft")
    options = ["--relaxation", "dora", "--relaxation-rank", 2, "--steps", 1]
    code, output, _ = _train(text, tmp_path, *options)
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.config.relaxation, model.config.relaxation_rank) == ("dora", 2)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters" in output


DENSE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "vocab_size": 320}
DENSE |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def _train_config(text, folder, values, *options):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return _train(text, folder / "run", "--config", path, "--steps", 1, *options)


@pytest.mark.parametrize(
    "values",
    [
        {"base_config": DENSE, "num_recursions": 2, "router_gating": "residual"},
        {"base_config": {**DENSE, "model_type": "qwen2"}, "num_recursions": 2, "router": "token"},
        {**DENSE, "model_type": "llama", "num_recursions": 2, "sharing": "middle_cycle"},
    ],
    ids=["no model_type", "dense model_type below", "flat"],
)
def test_keys_of_a_mor_configuration_make_one(text, tmp_path, values):
    """They were dropped, and a dense configuration of defaults taken instead."""
    assert _train_config(text, tmp_path, values)[0] == 0
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["num_recursions"] == 2
    assert saved["base_config"]["hidden_size"] == 16
    for name in ("router_gating", "router", "sharing"):
        assert saved[name] == values.get(name, saved[name])


def test_python_dash_m_answers_help_and_typos_without_loading_pytorch():
    for arguments, code, words in (
        (["--help"], 0, "look inside"),
        (["train", "--stepps", "3"], 2, "No such option: --stepps"),
        (["convert", "--help"], 0, "--relaxation"),
        (["--version"], 0, f"mor {mor.__version__}"),
        (["train", "--steps", "0"], 2, "--steps must be at least 1"),
    ):
        command = [sys.executable, "-X", "importtime", "-m", "mor", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert words in result.stdout + result.stderr
        loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
        assert "typer" in loaded
        assert not {"torch", "transformers", "numpy"} & loaded


def test_the_installed_script_answers_without_loading_pytorch(tmp_path):
    """As pip writes it, which imports the package first."""
    script = tmp_path / "mor"
    script.write_text("import sys\nfrom mor.cli import app\nsys.exit(app())\n")
    for arguments, code in ((["--help"], 0), (["train", "--stepps", "3"], 2)):
        command = [sys.executable, "-X", "importtime", script, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
        assert "mor.cli" in loaded
        assert not {"torch", "transformers", "numpy"} & loaded


def test_importing_the_package_registers_the_model_type_and_the_operators():
    code = (
        "import mor; from transformers import AutoConfig; import torch; "
        "print(AutoConfig.for_model('mor').model_type, torch.ops.mor.route_topk is not None)"
    )
    command = [sys.executable, "-c", code, "-m", "mor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["mor", "True"], result.stderr


def test_public_submodules_are_attributes_and_listed():
    for name in ("trl", "checkpoints", "analysis", "look", "ops", "models"):
        assert getattr(mor, name) is importlib.import_module(f"mor.{name}")
        assert name in dir(mor)
    assert not {"importlib", "ModuleType", "sys"} & set(dir(mor))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mor.nothing


# Ends early: one sentence with the next command


@pytest.mark.parametrize("router", ["expert", "token", "none"])
def test_divergence_is_one_sentence_with_the_command_to_go_on(text, tmp_path, router):
    options = ["--router", router, "--lr", 1e30, "--steps", 9, "--eval-every", 100]
    result = _train(text, tmp_path, *options, "--save-every", 1)
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    _refused(
        result, f"NaN or infinite at step {last + 1}", f"checkpoint-{last};",
        f"mor train --resume --output-dir {tmp_path} --lr 0.003",
    )  # fmt: skip
    assert not (tmp_path / "model").exists()


def test_resuming_takes_a_smaller_learning_rate(text, tmp_path):
    """The checkpoint's scheduler kept its own, so that what a diverged run says did not help."""
    assert _train(text, tmp_path, "--lr", 1e-2, "--warmup-share", 0, "--steps", 4)[0] == 0
    options = ["--lr", 1e-4, "--steps", 8, "--decay-share", 0]
    assert _mor("train", "--resume", "--output-dir", tmp_path, *options)[0] == 0
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    rates = {line["step"]: line["learning_rate"] for line in state["log_history"] if "loss" in line}
    assert rates[1] == pytest.approx(1e-2)
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx([1e-4] * 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_a_checkpoint(text, tmp_path, monkeypatch, number, code):
    step = MoRTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(number)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--save-every", 100, "--eval-every", 100, "--steps", 6]
    assert _train(text, whole, *options)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(MoRTrainer, "training_step", interrupted)
        got, _, errors = _train(text, stopped, *options)
    assert got == code
    resume = f"mor train --resume --output-dir {stopped}"
    assert errors == f"mor: stopped at step 3 of 6; go on: {resume}\n"
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (stopped / "model").exists()
    assert signal.getsignal(number) is handler
    assert _mor(*resume.split()[1:])[0] == 0
    weights = [folder / "model" / "model.safetensors" for folder in (whole, stopped)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_second_signal_ends_training_at_once(text, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(MoRTrainer, "training_step", interrupted)
    code, _, errors = _train(text, tmp_path)
    assert code == 130
    assert errors.startswith("mor: stopped at once")
    assert f"mor train --resume --output-dir {tmp_path}" in errors


def test_a_signal_while_text_is_read_is_one_line(text, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mor.training.run.prepare_tokens", interrupted)
    assert _train(text, tmp_path)[::2] == (143, "mor: stopped\n")


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
        (
            ["--router", "none", "--gating", "residual", "--router-type", "mlp"],
            ["--router-type, --gating would be ignored", "--router none"],
        ),
        (
            ["--schedule", "cosine", "--decay-share", ".3"],
            ["--decay-share would be ignored", "--schedule cosine"],
        ),
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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 64}, ["names no", "model_type", "llama"]),
        ({"num_recursions": 2}, ["num_recursions", "base_config"]),
        ({**DENSE, "num_recursions": 2}, ["num_recursions", "base_config"]),
        ({"model_type": "mor"}, ["base_config"]),
        ({"model_type": "llama", "base_config": DENSE}, ["base_config beside", '"mor"']),
        ({**DENSE, "model_type": "llama", "mor_swap": {"layers": 2}}, ["swapped", "load_swapped"]),
        ({**DENSE, "model_type": "bert"}, ["expected an architecture of", "bert"]),
    ],
    ids=str,
)
def test_a_configuration_of_unknown_kind_is_refused_before_text_is_read(
    text, tmp_path, values, words, monkeypatch
):
    monkeypatch.setattr("mor.training.run.open_corpus", None)
    _refused(_train_config(text, tmp_path, values), *words)


@pytest.mark.parametrize(
    "option", ["--layers", "--hidden-size", "--heads", "--gating", "--sharing"]
)
def test_an_option_that_would_be_ignored_is_refused_by_its_name(run, text, tmp_path, option):
    """Also where it has its default's value: it may contradict the model's."""
    values = {"--layers": 8, "--hidden-size": 256, "--gating": "weighted", "--heads": 4}
    given = [option, values.get(option, "middle_cycle")]
    beside = f"{option} would be ignored"
    _refused(_train(text, tmp_path, "--model", run / "model", *given), beside, "--model")
    config = run / "model" / "config.json"
    _refused(_train(text, tmp_path, "--config", config, *given), beside, "config.json")


def test_vocab_size_beside_a_tokenizer_is_refused(run, text, tmp_path):
    options = ["--tokenizer", run / "model", "--vocab-size", 400]
    _refused(_train(text, tmp_path, *options), "--vocab-size would be ignored", "--tokenizer")


def test_a_tokenizer_with_gaps_and_without_a_pad_token_trains_and_generates(text, tmp_path):
    words = sorted(set(text.read_text().split()))
    vocabulary = {word: 3 * number for number, word in enumerate(["<end>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, "<end>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert _train(text, tmp_path / "run", "--tokenizer", tmp_path / "tokenizer")[0] == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["base_config"]["vocab_size"] == 3 * len(words) + 1
    assert _mor("generate", tmp_path / "run", words[-1], "--max-new-tokens", 3)[0] == 0


def test_weights_that_are_trained_already_start_at_a_smaller_rate(run, text, tmp_path):
    for options, rate in (((), 3e-4), (("--lr", 1e-3), 1e-3)):
        folder = tmp_path / str(rate)
        options = ("--model", run / "model", "--warmup-share", 0, "--steps", 1, *options)
        assert _train(text, folder, *options)[0] == 0
        state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
        assert state["log_history"][0]["learning_rate"] == pytest.approx(rate)


def test_a_run_of_a_saved_model_is_resumed(run, text, tmp_path):
    """The folder came back from the run's record as a string, and the run failed."""
    assert _train(text, tmp_path, "--model", run / "model", "--steps", 2)[0] == 0
    code, _, errors = _mor("train", "--resume", "--output-dir", tmp_path, "--steps", 3)
    assert (code, errors) == (0, "")


# Generate and look


def test_a_swapped_model_generates_with_its_own_weights(run, tmp_path):
    """Auto classes load a fresh layer in the place of the routed one."""
    torch.manual_seed(0)
    sizes = {**DENSE, "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = mor.swap(LlamaForCausalLM(LlamaConfig(**sizes)), 3, num_recursions=2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run / "model").save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert _mor("generate", tmp_path, "line", "--max-new-tokens", 3)[0] == 0
    code, _, error = _mor("look", tmp_path, "line", "--output-dir", tmp_path / "look")
    assert code == 0, error
    assert (tmp_path / "look" / "depth.html").exists()


def test_generate_streams_and_reads_the_prompt_from_standard_input(run):
    named = ["--max-new-tokens", 8, "--top-k", 5, "--repetition-penalty", 1.2, "--seed", 3]
    parts = []
    model, tokenizer = load_model(run)
    text = continue_text(
        model, tokenizer, "line 1", max_new_tokens=8, top_k=5, repetition_penalty=1.2, seed=3,
        write=parts.append,
    )  # fmt: skip
    assert "".join(parts) == text
    assert len(parts) > 1
    code, output, _ = _mor("generate", run, "-", *named, input="line 1\n")
    assert (code, output) == (0, text + "\n")
    assert (
        _mor("generate", run, "line 1", "--top-k", 1, "--max-new-tokens", 8)[1]
        == (_mor("generate", run, "line 1", "--temperature", 0, "--max-new-tokens", 8)[1])
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
    ],
)
def test_generate_refuses_values_that_sample_nothing(run, options, word):
    _refused(_mor("generate", run, "x", *options), word)


def test_an_unfinished_run_generates_from_its_newest_complete_checkpoint(
    run, text, tmp_path, caplog
):
    shutil.copytree(run, tmp_path / "run")
    unfinished = tmp_path / "run"
    shutil.move(unfinished / "model", tmp_path / "model")
    assert find_model(unfinished) == unfinished / "checkpoint-4"
    assert "not finished: this is checkpoint-4" in caplog.text
    (unfinished / "checkpoint-4" / "optimizer.pt").unlink()
    assert find_model(unfinished) == unfinished / "checkpoint-2"
    # A run that was extended, and has not arrived, is not its old end.
    shutil.move(tmp_path / "model", unfinished / "model")
    assert find_model(unfinished) == unfinished / "model"
    state = json.loads((unfinished / "checkpoint-2" / "trainer_state.json").read_text())
    shutil.move(unfinished / "checkpoint-2", unfinished / "checkpoint-6")
    (unfinished / "checkpoint-6" / "trainer_state.json").write_text(
        json.dumps(state | {"global_step": 6})
    )
    assert find_model(unfinished) == unfinished / "checkpoint-6"


def test_a_copied_run_whose_files_have_other_times_is_still_finished(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    later = (tmp_path / "run" / "model" / "config.json").stat().st_mtime + 10
    os.utime(tmp_path / "run" / "checkpoint-4" / "trainer_state.json", (later, later))
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"


def test_train_takes_the_folder_of_a_run_as_generate_does(run, text, tmp_path):
    code, _, _ = _train(text, tmp_path, "--model", run, "--steps", 1)
    assert code == 0
    written = json.loads((tmp_path / "run.json").read_text())["options"]
    assert written["model"] == str((run / "model").resolve())


def test_a_text_longer_than_the_model_was_trained_on_is_said(run, caplog):
    assert _mor("generate", run, "line " * 9, "--max-new-tokens", 2)[0] == 0
    assert "more than the 16" in caplog.text


def test_look_writes_page_and_pictures(run, text, tmp_path):
    code, output, _ = _mor("look", run, "--text", text, "--output-dir", tmp_path / "look")
    assert code == 0
    written = [Path(line) for line in output.splitlines()]
    assert [path.name for path in written] == [
        "depth.html", "depth.png", "positions.png", "scores.png"
    ]  # fmt: skip
    page = written[0].read_text()
    assert page.count('<span class="t d') > 1000
    assert all(path.stat().st_size > 5000 for path in written)
    assert _mor("look", run, "line 4", "--output-dir", tmp_path / "one")[0] == 0
    _refused(_mor("look", run, "--output-dir", tmp_path), "--text FILE")
    _refused(_mor("look", run, "", "--output-dir", tmp_path), "an empty one")
    _refused(_mor("look", run, "--text", tmp_path / "none.txt"), "none.txt", "No such file")


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


def test_too_wide_heads_failed_at_the_first_step(text, tmp_path):
    code, _, error = _mor(
        *("train", "--hidden-size", 1040, "--heads", 4, "--layers", 5, "--vocab-size", 300),
        *("--data", text, "--output-dir", tmp_path / "run"),
    )
    assert code == 2
    assert "at most 256 dimensions, got 260" in error


def test_a_model_without_a_tokenizer_was_a_dead_end(tmp_path):
    base = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    LlamaForCausalLM(base).save_pretrained(tmp_path / "dense")
    code, said, error = _mor("convert", tmp_path / "dense", tmp_path / "mor", "--num-recursions", 2)
    assert code == 0, error
    assert "--tokenizer NAME" in said
    code, _, error = _mor("generate", tmp_path / "mor", "The")
    assert code == 2
    assert "there is no tokenizer in" in error
