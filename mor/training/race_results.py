"""Results of models that were trained to be compared: their costs, their losses, a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from transformers import TrainerState

from mor.analysis.costs import count_parameters, flops_per_token, kv_bytes_per_token
from mor.training.trainer import MoRTrainer

__all__ = ["CurvePoint", "ModelResult", "at_median_speed", "curve_of", "result_of", "table"]


class CurvePoint(NamedTuple):
    """An evaluation: what the training had cost by then, and the loss.

    Attributes:
        flops: training FLOPs (`mor.analysis.flops_per_token`).
        seconds: time in training steps, without evaluations and checkpoints.
        loss: of the held-out text, in nats per token.
    """

    flops: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class ModelResult:
    """A column of the table; the losses are in nats per token, of held-out text.

    Attributes:
        tokens_per_second: median over the turns.
    """

    name: str
    parameters: int
    flops_per_token: float
    kv_bytes_per_token: float
    train_tokens: int
    train_flops: float
    train_seconds: float
    tokens_per_second: float
    validation_loss: float
    curve: list[CurvePoint]


def curve_of(state: TrainerState, tokens_per_step: int) -> list[CurvePoint]:
    """Reads the evaluations from a trainer's log history.

    Args:
        state: of a `MoRTrainer`.
        tokens_per_step: tokens of an optimiser step, over all processes.
    """
    curve = []
    flops = seconds = 0.0
    step = 0
    for line in state.log_history:
        if "tokens_per_second" in line:  # each evaluation follows a log line of the same step
            seconds += (line["step"] - step) * tokens_per_step / line["tokens_per_second"]
            flops, step = line["total_flos"], line["step"]
        elif "eval_loss" in line:
            curve.append(CurvePoint(flops, seconds, line["eval_loss"]))
    return curve


def result_of(name: str, trainer: MoRTrainer, seq_len: int) -> ModelResult:
    """The costs and losses of a finished training.

    Args:
        name: of the model.
        trainer: after its last step, with an evaluation at the end.
        seq_len: S, tokens of a row.
    """
    arguments, config = trainer.args, trainer.model.config
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    tokens_per_step = rows * arguments.world_size * seq_len
    tokens = trainer.state.global_step * tokens_per_step
    curve = curve_of(trainer.state, tokens_per_step)
    return ModelResult(
        name=name,
        parameters=count_parameters(config),
        flops_per_token=flops_per_token(config, seq_len),
        kv_bytes_per_token=kv_bytes_per_token(config),
        train_tokens=tokens,
        train_flops=curve[-1].flops,
        train_seconds=curve[-1].seconds,
        tokens_per_second=statistics.median(_speeds(curve, tokens)),
        validation_loss=curve[-1].loss,
        curve=curve,
    )


def at_median_speed(result: ModelResult) -> list[CurvePoint]:
    """The curve with the time that its median speed over the turns gives.

    A neighbour that stalls one turn for a minute would otherwise lengthen one model's time.
    """
    seconds = result.train_tokens / result.tokens_per_second
    return [
        CurvePoint(point.flops, point.flops / result.train_flops * seconds, point.loss)
        for point in result.curve
    ]


def table(results: list[ModelResult]) -> str:
    """The results as a Markdown table."""
    rows = {
        "parameters": [f"{r.parameters / 1e6:.2f} M" for r in results],
        "FLOPs per token, forward": [f"{r.flops_per_token / 1e6:.2f} M" for r in results],
        "KV cache per token (float32)": [f"{r.kv_bytes_per_token / 1024:.2f} KiB" for r in results],
        "training tokens": [f"{r.train_tokens / 1e3:.0f} k" for r in results],
        "training FLOPs": [f"{r.train_flops:.3g}" for r in results],
        "training speed, median of the turns": [
            f"{r.tokens_per_second:.0f} tokens/s" for r in results
        ],
        "training time at that speed": [
            f"{r.train_tokens / r.tokens_per_second:.0f} s" for r in results
        ],
        "validation loss": [f"{r.validation_loss:.3f} nats/token" for r in results],
    }
    lines = ["| | " + " | ".join(r.name for r in results) + " |"]
    lines += ["| --- |" + " ---: |" * len(results)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


def _speeds(curve: Sequence[CurvePoint], tokens: int) -> list[float]:
    """Tokens per second between one evaluation and the next, of a training of so many tokens."""
    per_flop = tokens / curve[-1].flops
    points = pairwise([CurvePoint(0, 0, 0), *curve])
    return [(b.flops - a.flops) * per_flop / (b.seconds - a.seconds) for a, b in points]
