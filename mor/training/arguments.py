"""`transformers.TrainingArguments`: the paper's settings, a run's options, other fields by name."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from mor._extras import extra
from mor.training.options import RunOptions

__all__ = ["arguments_of", "training_arguments"]


def training_arguments(
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 3e-3,
    schedule: Literal["wsd", "cosine"] = "wsd",
    warmup_share: float = 0.05,
    decay_share: float = 0.2,
    min_learning_rate_share: float | None = None,
    weight_decay: float = 0.1,
    log_every: int = 10,
    eval_every: int = 100,
    save_every: int = 200,
    report_to: Sequence[str] = (),
    **overrides: Any,
) -> TrainingArguments:
    """The paper's optimiser settings as `transformers.TrainingArguments`.

    AdamW with betas 0.9 and 0.95, weight decay, gradient norm clipped at 1. Schedules: `"wsd"`,
    linear warm-up, constant, linear decay over the last `decay_share` of the steps to
    `min_learning_rate_share` (0) of the peak; `"cosine"` to `min_learning_rate_share` (0.1). An
    evaluation or save interval of 0 turns it off.

    Raises:
        ValueError: a count or share out of range, or an unknown schedule.

    Reference: MoR paper, section 3 and appendix B.
    """
    with extra("train"):
        import accelerate  # noqa: F401  (TrainingArguments asks for it, in other words)
    for name, count in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("gradient_accumulation", gradient_accumulation),
        ("log_every", log_every),
    ):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not (warmup_share >= 0 and decay_share >= 0 and warmup_share + decay_share <= 1):
        raise ValueError(
            "warmup_share and decay_share must lie in [0, 1] together, "
            f"got {warmup_share} and {decay_share}"
        )
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    warmup_steps = round(warmup_share * steps)
    schedules: dict[str, tuple[str, float, dict[str, Any]]] = {
        "wsd": (
            "warmup_stable_decay",
            0.0,
            {"num_decay_steps": round(decay_share * steps), "decay_type": "linear"},
        ),
        "cosine": ("cosine_with_min_lr", 0.1, {}),
    }
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r}: expected wsd or cosine")
    scheduler, least, kwargs = schedules[schedule]
    least = least if min_learning_rate_share is None else min_learning_rate_share
    kwargs["min_lr_ratio" if schedule == "wsd" else "min_lr_rate"] = least
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "learning_rate": learning_rate,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": kwargs,
        "warmup_steps": warmup_steps,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": weight_decay,
        "max_grad_norm": 1.0,
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if eval_every > 0 else "no",
        "eval_steps": eval_every if eval_every > 0 else None,
        "save_strategy": "steps" if save_every > 0 else "no",
        "save_steps": save_every if save_every > 0 else 500,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,  # every recursion runs its layers in every process
        "prediction_loss_only": True,
        "report_to": list(report_to) or "none",
        "use_cpu": not torch.cuda.is_available(),  # no other accelerator has our operators
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**{**arguments, **overrides})


def arguments_of(options: RunOptions) -> TrainingArguments:
    """TrainingArguments of a run.

    Raises:
        ValueError: a value that is not of its field's type, or a reporter that is not installed.
    """
    names = [name.strip() for name in options.report_to.split(",")]
    reporters = [] if names == ["none"] else names
    try:
        for reporter in get_reporting_integration_callbacks(
            "all" if names == ["all"] else reporters
        ):
            reporter()  # says here, and not after the text is read, what it needs to be installed
    except (RuntimeError, ImportError, ValueError) as error:
        reason = str(error).removesuffix(".")
        board = "; pip install 'mor[train]' brings tensorboard" if "tensorboard" in names else ""
        raise ValueError(f"--report-to {options.report_to}: {reason}{board}") from error
    named = _typed(options.training_arguments or {})
    if "lr_scheduler_type" in named:  # the schedule's own are not for another
        named.setdefault("lr_scheduler_kwargs", None)
    return training_arguments(
        options.output_dir,
        steps=options.steps,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
        learning_rate=options.peak_lr,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        decay_share=options.decay_share,
        weight_decay=options.weight_decay,
        log_every=options.log_every,
        eval_every=options.eval_every,
        save_every=options.save_every,
        report_to=reporters,
        bf16=options.bf16,
        **{
            "activation_checkpointing": options.gradient_checkpointing or None,
            "seed": options.seed,
            "disable_tqdm": not (options.progress and sys.stderr.isatty()),  # no bars into a log
            **named,
        },
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reads strings, and lists of them, as the types of their fields."""
    parser = _Parser(TrainingArguments, allow_abbrev=False, add_help=False)

    def read(name: str, value: Any) -> Any:
        if isinstance(value, str):
            words = [f"--{name}={value}"]
        elif isinstance(value, list) and all(isinstance(word, str) for word in value):
            words = [f"--{name}", *value]
        else:
            return value
        return getattr(parser.parse_args(words), name)

    return {name: read(name, value) for name, value in values.items()}
