"""Callbacks that bring routing to any `transformers.Trainer`; `MoRTrainer` does the same itself."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
)

from mor.modules import RoutingMetrics, TokenChoice

__all__ = ["LogRouting", "PrinterLine", "ProgressLine", "UpdateRouterBias", "routing_line"]


def routing_line(model: nn.Module, device: torch.device) -> dict[str, float]:
    """The routing metrics of all processes since the last call; empty without a router.

    Args:
        model: whose modules have `RoutingMetrics` as `metrics`. Of several routed layers the mean
            is logged, each metric over the layers that have it.
        device: where the process group, if any, communicates.
    """
    values: dict[str, list[float]] = {}
    for module in model.modules():
        metrics = getattr(module, "metrics", None)
        if isinstance(metrics, RoutingMetrics):
            metrics.sum_over_processes(device)
            for name, value in metrics.compute().items():
                values.setdefault(name, []).append(value)
            metrics.reset()
    return {name: fmean(found) for name, found in values.items()}


class LogRouting(TrainerCallback):
    """Adds the routing metrics to each log line of any Trainer, and so to TensorBoard and the rest.

    Example:
        >>> trainer = SFTTrainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> LogRouting.add_to(trainer)  # doctest: +SKIP
    """

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Adds the callback where it must stand: the reporters log what callbacks before them left.

        `Trainer(callbacks=...)` would put it after them.
        """
        callbacks = trainer.callback_handler.callbacks
        flow = [isinstance(callback, DefaultFlowCallback) for callback in callbacks].index(True)
        callbacks.insert(flow + 1, cls())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Logs before each evaluation, which adds its own tokens to the metrics."""
        control.should_log |= control.should_evaluate
        return control

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Extends the line that the reporters and the state get."""
        assert logs is not None and model is not None
        prefix = "eval_" if "eval_loss" in logs else ""
        values = {prefix + name: value for name, value in routing_line(model, args.device).items()}
        logs.update(values)
        state.log_history[-1].update(values)


class UpdateRouterBias(TrainerCallback):
    """Loss-free balancing: updates the routers' selection bias after every optimizer step.

    `MoRTrainer` has it; give it to a plain `transformers.Trainer` as `callbacks=[...]`.
    """

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """After the optimizer, before the gradients are cleared."""
        assert model is not None
        for module in model.modules():
            if isinstance(module, TokenChoice):
                module.update_bias()


def _line(state: TrainerState, logs: Mapping[str, Any]) -> str:
    hidden = {"epoch", "total_flos", "step", *(key for key in logs if key.endswith("_runtime"))}
    shown = [f"{key} {value:.4g}" for key, value in logs.items() if key not in hidden]
    return f"step {state.global_step}: " + ", ".join(shown)


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar with one short line for each log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes it above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(_line(state, logs))


class PrinterLine(PrinterCallback):
    """The same lines where there is no progress bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints it."""
        if state.is_world_process_zero and logs:
            print(_line(state, logs), flush=True)
