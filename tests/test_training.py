"""Training: what is logged and where, schedules, resuming exactly after a kill at any moment.

Over 300 lines in one file: a few trained runs, made once, serve all tests.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from mor import MoRConfig, MoRForCausalLM
from mor.analysis import flops_per_token
from mor.data import TokenBlocks, TokenFiles
from mor.training import Diverged, LogRouting, MoRTrainer, UpdateRouterBias, training_arguments
from mor.training.checkpoints import checkpoint_to_resume, find_problem
from mor.training.options import RunOptions
from mor.training.run import prepare_run, train

VOCAB, LENGTH = 300, 16


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("training")]


def _dense_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _model(kind: str) -> torch.nn.Module:
    set_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(_dense_config())
    return MoRForCausalLM(MoRConfig(base_config=_dense_config(), router=kind, router_z_coef=1e-3))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> TokenBlocks:
    """A hundred rows of a text with a simple rule, so that a small model learns it quickly."""
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    (np.arange(100 * LENGTH) * 7 % 50 + 1).astype("uint16").tofile(path)
    return TokenBlocks(TokenFiles(path, path, "uint16", 0, "x"), LENGTH)


def _trainer(kind: str, blocks: TokenBlocks, output_dir: Path, **options) -> MoRTrainer:
    values = {"steps": 6, "batch_size": 4, "log_every": 2, "eval_every": 3, "save_every": 0}
    arguments = training_arguments(output_dir, **{**values, **options}, disable_tqdm=True)
    return MoRTrainer(_model(kind), arguments, train_dataset=blocks, eval_dataset=blocks)


# Logs


@pytest.fixture(scope="module")
def logs(blocks, tmp_path_factory):
    """The same short run of three models, with all that it logged and its TensorBoard scalars."""
    results = {}
    for kind in ("expert", "token", "dense"):
        folder = tmp_path_factory.mktemp(kind)
        trainer = _trainer(kind, blocks, folder, report_to=["tensorboard"])
        trainer.train()
        events = EventAccumulator(str(next((folder / "runs").iterdir()))).Reload()
        results[kind] = trainer, events
    return results


def _lines(trainer: MoRTrainer, key: str = "loss") -> list[dict]:
    return [line for line in trainer.state.log_history if key in line]


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_every_line_has_loss_parts_routing_and_speed(logs, kind):
    trainer, _ = logs[kind]
    config = trainer.model.config
    router_loss = {"expert": "aux_loss", "token": "balancing_loss"}[kind]
    own = {"expert": "sampling_accuracy", "token": "max_vio"}[kind]
    weight = {"expert": config.router_aux_coef, "token": config.router_balance_coef}[kind]
    assert [line["step"] for line in _lines(trainer)] == [2, 3, 4, 6]
    for line in _lines(trainer):
        assert {"z_loss", "entropy", "dead_tokens", own} <= line.keys()
        parts = line["lm_loss"] + weight * line[router_loss] + config.router_z_coef * line["z_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert line["selected_share_1"] == 1.0
        assert 0 <= line["selected_share_3"] <= line["selected_share_2"] <= 1
        assert line["tokens_per_second"] > 0


def test_dense_model_logs_no_routing(logs):
    trainer, _ = logs["dense"]
    for line in _lines(trainer):
        assert not any("selected" in key or "aux" in key for key in line)
        assert line["tokens_per_second"] > 0


@pytest.mark.parametrize("kind", ["expert", "dense"])
def test_flops_are_those_of_the_analysis(logs, kind):
    trainer, _ = logs[kind]
    per_step = 4 * LENGTH * flops_per_token(trainer.model.config, LENGTH, training=True)
    for line in _lines(trainer):
        assert line["total_flos"] == pytest.approx(line["step"] * per_step)


@pytest.mark.parametrize("kind", ["expert", "token", "dense"])
def test_tensorboard_gets_every_number(logs, kind):
    trainer, events = logs[kind]
    for prefix, key in (("train/", "loss"), ("eval/", "eval_loss")):
        lines = _lines(trainer, key)
        for name in lines[-1].keys() - {"step", "epoch"}:
            tag = prefix + name.removeprefix("eval_")
            values = {event.step: event.value for event in events.Scalars(tag)}
            for line in lines:
                assert values[line["step"]] == pytest.approx(line[name], rel=1e-4), tag


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("expert", {"dead_tokens", "entropy", "sampling_accuracy", "selected_share_3"}),
        ("token", {"dead_tokens", "entropy", "max_vio", "selected_share_3"}),
    ],
)
def test_a_plain_trainer_sends_routing_to_tensorboard(kind, metrics, logs, blocks, tmp_path):
    arguments = training_arguments(
        tmp_path, steps=6, batch_size=4, log_every=2, eval_every=3, report_to=["tensorboard"]
    )
    trainer = Trainer(_model(kind), arguments, train_dataset=blocks, eval_dataset=blocks)
    LogRouting.add_to(trainer)
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir()))).Reload()
    ours, _ = logs[kind]
    for prefix, key in (("train/", "loss"), ("eval/", "eval_loss")):
        # How the threshold agrees with the selection by rank is a question of training alone.
        for name in metrics - ({"sampling_accuracy"} if prefix == "eval/" else set()):
            values = {event.step: event.value for event in events.Scalars(prefix + name)}
            own = ("eval_" if prefix == "eval/" else "") + name
            expected = {line["step"]: line[own] for line in _lines(ours, key)}
            assert values == pytest.approx(expected, rel=1e-4), name
            kept = {line["step"]: line[own] for line in _lines(trainer, key)}
            assert kept == pytest.approx(expected, rel=1e-6), name


def test_evaluation_logs_the_language_model_loss_and_its_own_routing(logs, blocks):
    trainer, _ = logs["expert"]
    line = _lines(trainer, "eval_loss")[-1]
    model = trainer.model.eval()
    batch = {key: torch.stack([row[key] for row in blocks]) for key in blocks[0]}
    with torch.no_grad():
        expected = model(**batch).lm_loss.item()
    assert line["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert line["eval_selected_share_1"] == 1.0
    # Evaluation's shares come from the threshold, training's from the capacities.
    assert _lines(trainer)[-1]["selected_share_2"] == 0.625


def test_gradient_accumulation_logs_what_one_batch_logs(blocks, tmp_path):
    lines = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = _trainer(
            "expert",
            blocks,
            tmp_path / str(batch),
            batch_size=batch,
            gradient_accumulation=accumulation,
            eval_every=0,
            steps=2,
        )
        trainer.train()
        lines.append(_lines(trainer)[-1])
    for key in ("loss", "lm_loss", "aux_loss", "z_loss", "selected_share_2", "total_flos"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-5), key


def test_training_learns(blocks, tmp_path):
    trainer = _trainer(
        "expert", blocks, tmp_path, steps=60, log_every=1, eval_every=0, learning_rate=1e-2
    )
    trainer.train()
    losses = [line["lm_loss"] for line in _lines(trainer)]
    assert losses[0] > 5
    assert losses[-1] < 2


def test_bfloat16_trains_with_float32_weights(blocks, tmp_path):
    trainer = _trainer("expert", blocks, tmp_path, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(np.isfinite(line["loss"]) for line in _lines(trainer))
    exact = _trainer("expert", blocks, tmp_path / "exact")
    exact.train()
    difference = _lines(trainer)[0]["loss"] - _lines(exact)[0]["loss"]
    assert 0 < abs(difference) < 0.05


# Schedules and arguments


def _learning_rates(folder: Path, schedule: str, **options) -> list[float]:
    arguments = training_arguments(
        folder, steps=20, schedule=schedule, learning_rate=1.0, eval_every=0, **options
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    trainer = MoRTrainer(_model("dense"), arguments, optimizers=(optimizer, None))
    scheduler = trainer.create_scheduler(20, optimizer)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_wsd_warms_up_stays_and_decays_linearly(tmp_path):
    rates = _learning_rates(tmp_path, "wsd", warmup_share=0.2, decay_share=0.25)
    assert rates[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_ends_near_a_tenth(tmp_path):
    rates = _learning_rates(tmp_path, "cosine", warmup_share=0.1)
    assert rates[2] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert 0.1 < rates[-1] < 0.12


def test_optimizer_is_the_papers(blocks, tmp_path):
    trainer = _trainer("expert", blocks, tmp_path)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert trainer.args.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 5, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 5, "schedule": "step"}, "unknown schedule 'step': expected wsd or cosine"),
        ({"steps": 5, "learning_rate": 0.0}, r"learning_rate must be positive, got 0\.0"),
        ({"steps": 5, "warmup_share": 0.9}, "warmup_share and decay_share must lie in"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        training_arguments("unused", **options)


# Checkpoints

STEPS = 10


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 60 rows of text: the run below passes over it more than once."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {n} of {n * n % 97} and {n % 13}" for n in range(60)))
    return path


def _options(text: Path, output_dir: Path, **options) -> RunOptions:
    return RunOptions(
        **{
            "output_dir": output_dir,
            "data": str(text),
            "vocab_size": VOCAB,
            "seq_len": LENGTH,
            "layers": 5,
            "hidden_size": 32,
            "heads": 2,
            "steps": STEPS,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "log_every": 1,
            "eval_every": 5,
            "eval_rows": 4,
            "save_every": 4,
            "report_to": "none",
            "progress": False,
            **options,
        }
    )


def _losses(trainer: MoRTrainer) -> list[tuple]:
    """Everything in the log that must not depend on being interrupted."""
    kept = []
    for line in trainer.state.log_history:
        if "loss" in line or "eval_loss" in line:
            timed = ("second", "runtime")
            kept.append({k: v for k, v in line.items() if not any(word in k for word in timed)})
    return kept


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, checkpoint = prepare_run(_options(text, folder))
    assert checkpoint is None
    train(trainer, None)
    assert len(_losses(trainer)) == STEPS + 2
    return trainer, folder


# Runs in a process of its own and kills it, as SIGKILL from outside would, at an exact moment:
# after a step, or when half of a file of a checkpoint is written.
_KILLED_RUN = """
import json, os, signal, sys
import safetensors.torch, torch
from mor.training.options import RunOptions
from mor.training.run import prepare_run, train
from pathlib import Path

options, moment = json.loads(sys.argv[1]), sys.argv[2]
options["output_dir"] = Path(options["output_dir"])
trainer, _ = prepare_run(RunOptions(**options))


def die(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(module, name, file):
    whole = getattr(module, name)

    def half(*args, **kwargs):
        whole(*args, **kwargs)
        for path in args:
            if "checkpoint-8" in str(path) and str(path).endswith(file):
                die(path)

    setattr(module, name, half)


if moment == "step":
    step = trainer.training_step

    def killed_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    trainer.training_step = killed_step
elif moment == "weights":
    import transformers.modeling_utils

    dies_in(transformers.modeling_utils, "safe_save_file", "model.safetensors")
elif moment == "optimizer":
    dies_in(torch, "save", "optimizer.pt")
elif moment == "state":
    from transformers import TrainerState

    dies_in(TrainerState, "save_to_json", "trainer_state.json")
train(trainer, None)
"""


@pytest.mark.parametrize("moment", ["step", "weights", "optimizer", "state"])
def test_killed_run_resumes_with_the_same_losses(uninterrupted, text, tmp_path, moment, caplog):
    options = _options(text, tmp_path)
    arguments = {**vars(options), "output_dir": str(tmp_path)}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_RUN, json.dumps(arguments), moment],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "checkpoint-8").exists() == (moment != "step")

    trainer, checkpoint = prepare_run(_options(text, tmp_path, resume=True))
    assert checkpoint == tmp_path / "checkpoint-4"
    assert ("skipping" in caplog.text) == (moment != "step")
    train(trainer, checkpoint)
    whole, _ = uninterrupted
    assert _losses(trainer) == _losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def _damaged_copy(folder: Path, to: Path, file: str, damage: str) -> Path:
    """A copy of checkpoint-10 of a run with one file damaged; the rest are links."""
    to.mkdir()
    for path in (folder / "checkpoint-10").iterdir():
        os.symlink(path, to / path.name)
    path = to / file
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-20])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    return to


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
@pytest.mark.parametrize(
    "file",
    ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
)
def test_damaged_checkpoint_is_recognised(uninterrupted, tmp_path, file, damage):
    _, folder = uninterrupted
    assert find_problem(folder / "checkpoint-10") is None
    problem = find_problem(_damaged_copy(folder, tmp_path / "checkpoint-10", file, damage))
    assert problem is not None
    assert file in problem


def test_flipped_bit_in_the_optimizer_is_recognised(uninterrupted, tmp_path):
    _, folder = uninterrupted
    damaged = _damaged_copy(folder, tmp_path / "checkpoint-10", "optimizer.pt", "flipped")
    assert find_problem(damaged) == "optimizer.pt is damaged"


def test_newest_complete_checkpoint_is_chosen(uninterrupted, tmp_path, caplog):
    _, folder = uninterrupted
    os.symlink(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    _damaged_copy(folder, tmp_path / "checkpoint-10", "model.safetensors", "truncated")
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-8"
    assert "skipping" in caplog.text
    assert "checkpoint-10: model.safetensors is damaged" in caplog.text
    assert checkpoint_to_resume(tmp_path / "nothing") is None


def test_named_checkpoint_must_be_complete(uninterrupted, text, tmp_path):
    _, folder = uninterrupted
    damaged = _damaged_copy(folder, tmp_path / "bad", "optimizer.pt", "truncated")
    with pytest.raises(ValueError, match=r"cannot resume from .*bad: optimizer\.pt is damaged"):
        prepare_run(_options(text, tmp_path / "run", resume_from=damaged))
    with pytest.raises(ValueError, match=r"cannot resume from .*nowhere: no such folder"):
        prepare_run(_options(text, tmp_path / "run", resume_from=tmp_path / "nowhere"))


def test_checkpoint_of_another_model_is_refused(uninterrupted, text, tmp_path):
    _, folder = uninterrupted
    with pytest.raises(ValueError, match=r"holds another model: .* is \[.*\] there, expected \["):
        prepare_run(_options(text, tmp_path, resume_from=folder / "checkpoint-10", hidden_size=64))


def test_old_run_is_not_overwritten(uninterrupted, text):
    _, folder = uninterrupted
    with pytest.raises(ValueError, match=r"already holds checkpoint-\d+: add --resume"):
        prepare_run(_options(text, folder))


def test_changed_text_is_warned_about_on_resuming(uninterrupted, text, tmp_path, caplog):
    trainer, checkpoint = prepare_run(_options(text, tmp_path, steps=4))
    train(trainer, checkpoint)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() * 2)
    prepare_run(_options(other, tmp_path, resume=True))
    assert "the text or the tokenizer is not what" in caplog.text


@pytest.mark.parametrize("trainer_class", ["MoRTrainer", "Trainer"])
def test_loss_free_balancing_moves_the_bias_after_every_optimizer_step(
    trainer_class, blocks, tmp_path
):
    set_seed(0)
    config = MoRConfig(base_config=_dense_config(), router="token", router_balancing="loss_free")
    model = MoRForCausalLM(config)
    arguments = training_arguments(
        tmp_path, steps=3, batch_size=2, gradient_accumulation=2, save_every=0, eval_every=0
    )
    if trainer_class == "MoRTrainer":
        trainer = MoRTrainer(model, arguments, train_dataset=blocks)
    else:
        callbacks = [UpdateRouterBias()]
        trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=callbacks)
    trainer.train()
    bias = model.model.recursion.bias / config.router_bias_update_rate
    torch.testing.assert_close(bias, bias.round(), atol=1e-3, rtol=0)
    assert 1 <= bias.abs().max() <= 3
    assert not model.model.recursion.load.any()


@pytest.mark.parametrize("router", ["expert", "token"])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(router, blocks, tmp_path):
    set_seed(0)
    model = MoRForCausalLM(MoRConfig(base_config=_dense_config(), router=router))
    arguments = training_arguments(
        tmp_path, steps=9, batch_size=2, save_every=2, eval_every=0, log_every=100
    )

    class Diverging(MoRTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 4 else loss

    with pytest.raises(
        Diverged, match=r"NaN or infinite at step 5; .*checkpoint-4; .*smaller"
    ) as e:
        Diverging(model, arguments, train_dataset=blocks).train()
    kept = checkpoint_to_resume(tmp_path)
    assert kept is not None
    assert kept.name == "checkpoint-4"
    assert e.value.step == 5


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(blocks, tmp_path):
    """The loss of the step was finite, its update was not."""
    trainer = _trainer("expert", blocks, tmp_path, save_every=2, eval_every=0, log_every=100)

    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                next(iter(trainer.model.parameters())).data.fill_(float("nan"))

    trainer.add_callback(Broken())
    with pytest.raises(Diverged, match=r"at step 4; the last checkpoint is .*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()
