"""Ends training with a checkpoint when the process is asked to stop."""

from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mor.training.signals import notice, stop

__all__ = ["StopOnSignal"]


class StopOnSignal(TrainerCallback):
    """Ends training after the step or the evaluation in which `ask` was called, with a checkpoint.

    Several processes end together, at the next log line: there they meet anyway.

    Attributes:
        number: the signal, or None.
    """

    number: int | None = None

    def ask(self, number: int) -> None:
        """Handles a signal; the second one ends the process at once.

        Raises:
            Stopped: the second time.
        """
        if self.number is not None:
            stop(number)
        self.number = number
        notice("stopping after this step, with a checkpoint; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops; logs too, as before every checkpoint."""
        if (args.world_size == 1 or control.should_log) and self._asked(args):
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops; the log line was before the evaluation."""
        if self._asked(args):
            control.should_save = control.should_training_stop = True
        return control

    def _asked(self, args: TrainingArguments) -> bool:
        if args.world_size > 1:
            number = torch.tensor(self.number or 0, device=args.device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            self.number = int(number) or None
        return self.number is not None
