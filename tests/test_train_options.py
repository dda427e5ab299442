"""Options of `mor train`: fields of TrainingArguments by name, a YAML file, what is refused."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from typer.testing import CliRunner

from mor.cli import app
from mor.training.argument_names import OURS, argument_names
from mor.training.arguments import arguments_of
from mor.training.options import RunOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Runs `mor train` up to the point where it has its options, and returns them."""

    def prepare_run(options, *, given, say):
        kept.append((options, given))
        raise ValueError("seen")

    kept: list[tuple[RunOptions, set[str]]] = []
    monkeypatch.setattr("mor.training.run.prepare_run", prepare_run)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[RunOptions, set[str]]:
        result = CliRunner().invoke(app, ["train", *map(str, words)])
        assert "mor: seen" in result.stderr, result.output + result.stderr
        return kept[-1]

    return run


def refused(*words: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *map(str, words)])
    assert result.exit_code == 2
    return " ".join(result.stderr.replace("│", " ").split())


def test_names_are_those_of_the_class():
    own = {field.name for field in fields(TrainingArguments) if field.init}
    assert argument_names() == {name for name in own if not name.startswith("_")}
    assert OURS.keys() <= argument_names()
    assert set(OURS.values()) <= {field.name for field in fields(RunOptions)}


def test_every_field_is_an_option(seen):
    named = argument_names() - OURS.keys() - {field.name for field in fields(RunOptions)}
    ignored = {"num_train_epochs", "do_train", "do_eval", "do_predict"}
    words = [f"--{name}=1" for name in sorted(named - ignored)]
    options, _ = seen(*words)
    assert options.training_arguments == dict.fromkeys(named - ignored, "1")
    for name in ignored:
        assert f"--{name.replace('_', '-')} would be ignored" in refused(f"--{name}", 1)


@pytest.mark.parametrize("spelt", ["--learning_rate", "--learning-rate", "--lr"])
def test_a_field_that_is_ours_may_be_spelt_either_way(seen, spelt):
    options, given = seen(spelt, "1e-3", "--max_steps=7", "--weight_decay", 0.2, "--seq_len", 32)
    assert (options.lr, options.steps, options.weight_decay, options.seq_len) == (1e-3, 7, 0.2, 32)
    assert given == {"lr", "steps", "weight_decay", "seq_len"}
    assert options.training_arguments is None


def test_fields_have_their_types(seen, tmp_path):
    options, _ = seen(
        *(
            "--warmup_steps",
            9,
            "--warmup_steps",
            10,
            "--optim=adafactor",
            "--no_dataloader_drop_last",
            "--use-cpu",
        ),
        *("--label_names", "a", "b", "--lr-scheduler-type", "linear", "--steps", 20),
        *("--report-to", "none", "--output-dir", tmp_path),
    )
    arguments = arguments_of(options)
    assert arguments.warmup_steps == 10
    assert arguments.optim == "adafactor"
    assert (arguments.dataloader_drop_last, arguments.use_cpu) == (False, True)
    assert arguments.label_names == ["a", "b"]
    assert (arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs) == ("linear", None)
    assert (arguments.max_steps, arguments.adam_beta2) == (20, 0.95)  # as ever


def test_a_file_of_options(seen, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "steps: 30\nseq-len: 64\nlearning_rate: 1e-3\ncapacities: [1, 0.5, 0.25]\nbf16: true\n"
        "progress: false\nwarmup_steps: 3\nlr_scheduler_kwargs: {num_decay_steps: 4}\n"
        "data: null\n"
    )
    options, given = seen("--options", file, "--steps", 40, "--warmup-steps", 5)
    assert (options.steps, options.seq_len, options.lr) == (40, 64, 1e-3)
    assert (options.capacities, options.bf16, options.progress) == ("1,0.5,0.25", True, False)
    assert options.training_arguments == {
        "warmup_steps": "5",
        "lr_scheduler_kwargs": {"num_decay_steps": 4},
    }
    assert {"steps", "seq_len", "lr", "bf16", "progress"} <= given
    assert "data" not in given


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seq_lem: 3", "run.yaml: there is no option 'seq_lem'; did you mean seq_len?"),
        ("warmup-step: 3", "there is no option 'warmup-step'; did you mean warmup_steps?"),
        ("qwertz: 3", "run.yaml: there is no option 'qwertz'"),
        ("options_file: other.yaml", "there is no option 'options_file'"),
        ("steps: 1.5", "Invalid value for '--steps'"),
        ("steps: {a: 1}", "run.yaml: expected one value of 'steps'"),
        ("- steps", "run.yaml: expected options as NAME: VALUE"),
        ("steps: [1", "run.yaml is not YAML"),
        ("router: none\ngating: residual", "--gating would be ignored: --router none"),
        (None, "cannot read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, words):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    assert words in refused("--options", file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--warmup_stesp", 3], "No such option: --warmup_stesp"),
        (["--warmup_stesp", 3], "--warmup_steps"),
        (["--warmup_steps", 3, "--warmup-share", 0.1], "--warmup-share would be ignored"),
        (["--lr_scheduler_type=linear", "--schedule", "cosine"], "--schedule would be ignored"),
        (["--warmup_steps", "many"], "invalid float value: 'many'"),
        (["--optim", "sdg"], "sdg"),
        (["stray"], "Got unexpected extra argument(s) (stray)"),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path, options, words):
    assert words in refused(*options, "--output-dir", tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 1}, "TrainingArguments' learning_rate is the option lr of a run"),
        ({"seed": 1}, "TrainingArguments' seed is the option seed of a run"),
        ({"optimm": 1}, "TrainingArguments has no 'optimm'; did you mean optim"),
    ],
)
def test_python_callers_are_told_too(values, words):
    with pytest.raises(ValueError, match=words):
        RunOptions(training_arguments=values).check(())


def test_a_resumed_run_keeps_its_fields(seen, tmp_path):
    record = {"training_arguments": {"optim": "adafactor", "warmup_steps": "3"}, "steps": 9}
    (tmp_path / "run.json").write_text(json.dumps({"options": record, "tokens": ""}))
    options, _ = seen("--resume", "--output-dir", tmp_path, "--warmup_steps", 4)
    assert options.steps == 9
    assert options.training_arguments == {"optim": "adafactor", "warmup_steps": "4"}
    options, _ = seen("--resume-from", tmp_path / "checkpoint-1", "--output-dir", Path("new"))
    assert options.training_arguments == {"optim": "adafactor", "warmup_steps": "3"}
