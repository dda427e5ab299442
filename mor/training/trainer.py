"""Training: `transformers.Trainer` with the numbers of a routed model in its logs.

`MoRTrainer` changes nothing in how the Trainer trains. It adds to each log line, and so to the
progress bar, to TensorBoard and to `trainer_state.json`: the parts of the loss, the routing
metrics, tokens per second, and the training FLOPs so far.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mor.analysis.costs import flops_per_token
from mor.models.router_losses import collect_router_losses
from mor.models.targets import at_least_one, batch_share, num_targets
from mor.training.callbacks import (
    LogRouting,
    PrinterLine,
    ProgressLine,
    UpdateRouterBias,
    routing_line,
)
from mor.training.checkpoints import checkpoint_to_resume
from mor.training.optim import parameter_groups

__all__ = [
    "Diverged",
    "LogRouting",
    "MoRTrainer",
    "UpdateRouterBias",
    "loss_scale",
]

_ROUTER_LOSSES = ("aux_loss", "z_loss", "balancing_loss")


class Diverged(FloatingPointError):
    """The loss, or the weights, are not finite any more.

    Attributes:
        step: the first one of which this is known.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class MoRTrainer(Trainer):
    """`transformers.Trainer` that also logs loss parts, routing metrics, tokens/s and FLOPs.

    Any causal language model can be trained; what it does not report (a dense model has no router)
    is not logged. The evaluation loss is the language-model loss alone, so that it compares across
    models.

    Log keys: `lm_loss`, `aux_loss`, `z_loss`, `balancing_loss` (where the model has them), what
    `model.routing_metrics.compute()` gives (`selected_share_1`, ...), `tokens_per_second` (without
    the time for evaluation and checkpoints) and `total_flos` (`mor.analysis.flops_per_token`),
    which the Trainer also keeps in its state.

    Example:
        >>> trainer = MoRTrainer(model, arguments, train_dataset=blocks)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *args: Any, aux_router_learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        """Takes the Trainer's arguments.

        Args:
            *args: the Trainer's.
            aux_router_learning_rate: peak rate of auxiliary routers; see `parameter_groups`.
            **kwargs: the Trainer's.
        """
        super().__init__(*args, **kwargs)
        self.aux_router_learning_rate = aux_router_learning_rate
        self._parts: defaultdict[str, Tensor | float] = defaultdict(float)
        self._lost_step: Tensor | int = 0  # the first one whose loss was not finite
        self._window_batches = 0
        self._window_tokens = 0
        self._window_start: float | None = None
        self._window_step = 0
        self.add_callback(_CloseWindow())
        self.add_callback(UpdateRouterBias())
        for plain, ours in ((ProgressCallback, ProgressLine), (PrinterCallback, PrinterLine)):
            if self.pop_callback(plain) is not None:
                self.add_callback(ours())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, or with `parameter_groups` where auxiliary routers have their own rate."""
        if self.optimizer is None and self.aux_router_learning_rate is not None:
            trained = self.model if model is None else model
            groups = parameter_groups(
                trained, self.args.weight_decay, self.aux_router_learning_rate
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: not recursion encodings, which start at ones."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("recursion_encoding")]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One forward and backward, counted."""
        if self._window_start is None:
            self._window_start, self._window_step = time.perf_counter(), self.state.global_step
        rows, length = _shape(inputs)
        self._window_tokens += rows * length
        with self._naming_divergence(self.state.global_step + 1):
            loss = super().training_step(model, inputs, num_items_in_batch)
        sound = loss.isfinite() | (self._lost_step > 0)
        self._lost_step = torch.where(sound, self._lost_step, self.state.global_step + 1)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; a router refuses the NaN of weights that the last step broke."""
        with self._naming_divergence(self.state.global_step):
            return super().prediction_step(*args, **kwargs)

    @contextmanager
    def _naming_divergence(self, step: int) -> Iterator[None]:
        """Routers refuse NaN before there is a loss: an operator's error, with another cause."""
        try:
            yield
        except RuntimeError as error:
            if "NaN" not in str(error):
                raise
            raise self._diverged(int(self._lost_step) or step) from error

    def _diverged(self, step: int) -> Diverged:
        kept = checkpoint_to_resume(self.args.output_dir)
        last = f"the last checkpoint is {kept}" if kept else "there is no checkpoint"
        message = f"the loss became NaN or infinite at step {step}; {last}; go on with a smaller"
        return Diverged(step, f"{message} learning rate")

    def refuse_nan(self) -> None:
        """Stops before a broken model is written over good checkpoints.

        Raises:
            Diverged: a loss was not finite.
        """
        if step := int(self._lost_step):
            raise self._diverged(step)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.refuse_nan()
        # The last step's loss may be finite and its gradients not.
        shards = (getattr(p, "_local_tensor", p).detach() for p in self.model.parameters())
        if not all(bool(shard.isfinite().all()) for shard in shards):
            raise self._diverged(self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Does not miss weights that are tied to others: a checkpoint holds one of them."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the checkpoint's state, but keep the peak learning rates that were given."""
        scheduler = self.lr_scheduler
        peaks = getattr(scheduler, "base_lrs", None)
        peaks = None if peaks is None else list(peaks)
        super()._load_optimizer_and_scheduler(checkpoint)
        if peaks is None or scheduler.base_lrs == peaks:
            return
        assert self.optimizer is not None
        was, scheduler.base_lrs = scheduler.base_lrs, peaks
        scheduler._last_lr = [
            rate * peak / old if old else rate
            for rate, peak, old in zip(scheduler.get_last_lr(), peaks, was, strict=True)
        ]
        for group, rate, peak in zip(
            self.optimizer.param_groups, scheduler.get_last_lr(), peaks, strict=True
        ):
            group["lr"], group["initial_lr"] = rate, peak

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss in training, its language-model loss in evaluation."""
        labels = inputs.get("labels")
        items = None if num_items_in_batch is None else at_least_one(num_items_in_batch)
        if getattr(getattr(model, "config", None), "return_dict", None) is False:
            inputs["return_dict"] = True  # the parts of the loss have names
        with collect_router_losses():  # added below where the model has no labels
            loss, outputs = super().compute_loss(model, inputs, True, items)
        if model.training and "labels" not in inputs and labels is not None:
            # Label smoothing and loss functions of one's own keep the labels from the model.
            router_loss = outputs.get("router_loss")
            if router_loss is not None:
                share = batch_share(num_targets(labels), num_items_in_batch)
                loss = loss + share * loss_scale(self, num_items_in_batch) * router_loss
        if not model.training:
            lm_loss = outputs.get("lm_loss")
            if lm_loss is not None:
                loss = lm_loss * loss_scale(self, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        self._window_batches += 1
        for name in ("lm_loss", *_ROUTER_LOSSES):
            part = outputs.get(name)
            if part is not None:
                self._parts[name] = self._parts[name] + part.detach()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch, as `mor.analysis` counts them."""
        rows, length = _shape(inputs)
        config = self.accelerator.unwrap_model(self.model).config
        return round(rows * length * flops_per_token(config, length, training=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's numbers before any callback or the state sees the line."""
        if "loss" in logs:
            self.refuse_nan()
            logs = {**logs, **self._close_window(), "total_flos": self.state.total_flos}
        elif "eval_loss" in logs:
            logs = {**logs, **{f"eval_{name}": value for name, value in self._routing().items()}}
        super().log(logs, start_time)

    def _close_window(self) -> dict[str, float]:
        seconds = time.perf_counter() - (self._window_start or 0.0)
        steps = max(1, self.state.global_step - self._window_step)
        parts = {}
        for name, total in self._parts.items():
            # A router loss is a mean over its batch. The language-model loss is normalised by the
            # targets of the optimizer step: over the step's batches and processes it adds up.
            router = name in _ROUTER_LOSSES
            total = self.accelerator.reduce(total, reduction="mean" if router else "sum")
            parts[name] = float(total) / (self._window_batches if router else steps)
        tokens = self._window_tokens * self.accelerator.num_processes
        speed = {} if self._window_start is None else {"tokens_per_second": tokens / seconds}
        self._parts.clear()
        self._window_batches = self._window_tokens = 0
        self._window_start = None
        return {**parts, **self._routing(), **speed}

    def _routing(self) -> dict[str, float]:
        return routing_line(self.accelerator.unwrap_model(self.model), self.accelerator.device)


def _shape(inputs: dict[str, Any]) -> tuple[int, int]:
    """B and S of a batch, of ids or of embeddings."""
    ids = inputs.get("input_ids")
    rows, length = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
    return rows, length


def loss_scale(trainer: Any, num_items_in_batch: Tensor | int | None) -> int:
    """A Trainer's factor on losses that are sums over the targets of all processes.

    The mean over the processes, which follows, makes it their sum again.
    """
    if num_items_in_batch is None or not trainer.args.average_tokens_across_devices:
        return 1
    return int(trainer.accelerator.num_processes // trainer.get_tp_size())


class _CloseWindow(TrainerCallback):
    """Logs before each evaluation and checkpoint.

    So a log line never spans a checkpoint: a resumed run logs the same averages as an uninterrupted
    one. And training's routing metrics are read before evaluation adds its own.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save or control.should_evaluate
        return control

    on_epoch_end = on_step_end
