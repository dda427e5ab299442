"""Router losses on their way to a trainer that computes the loss on the decoder's output.

TRL's trainers do: they replace the forward of the causal model, which would add the router losses,
by one that takes hidden states from the decoder. What the decoder then has to say travels here, for
one call and in one thread: nothing is hooked, nothing stays behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

__all__ = [
    "CollectedLosses",
    "TellsLostLosses",
    "collect_router_losses",
    "hand_over",
    "take_back",
    "tell_lost",
]


class CollectedLosses:
    """Weighted router losses of the forward passes inside a `collect_router_losses`.

    Attributes:
        calls: forward passes of MoR decoders in training mode.
        losses: their router losses, but for those that a model's own loss contains already.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.losses: list[Tensor] = []

    def mean(self) -> Tensor | None:
        """Over the forward passes that are differentiated; None without any."""
        losses = [loss for loss in self.losses if loss.requires_grad]
        return torch.stack(losses).mean() if losses else None


_collected: ContextVar[CollectedLosses | None] = ContextVar("router_losses", default=None)


@contextmanager
def collect_router_losses() -> Iterator[CollectedLosses]:
    """Collects the router losses of what this thread runs inside, uncompiled."""
    collected = CollectedLosses()
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def hand_over(router_loss: Tensor | None, training: bool) -> None:
    """By a decoder, in every forward pass."""
    if torch.compiler.is_compiling():
        return
    collected = _collected.get()
    if collected is None or not training:
        return
    collected.calls += 1
    if router_loss is not None:
        collected.losses.append(router_loss)


def take_back(router_loss: Tensor | None) -> None:
    """By a causal model that adds the loss itself."""
    if torch.compiler.is_compiling():
        return
    collected = _collected.get()
    if collected is not None:
        collected.losses = [loss for loss in collected.losses if loss is not router_loss]


def tell_lost(router_loss: Tensor | None, num_items_in_batch: Any) -> None:
    """By a causal model without targets: says so if a Trainer will compute a loss without it.

    `num_items_in_batch` is the sign: the Trainer passes it, and keeps the labels to itself.
    """
    if torch.compiler.is_compiling() or num_items_in_batch is None or router_loss is None:
        return
    if router_loss.requires_grad and _collected.get() is None:
        logging.get_logger("mor").warning_once(
            "label smoothing and compute_loss_func keep the labels from the model, so the router "
            "losses are left out: use mor.training.MoRTrainer, which adds them"
        )


class TellsLostLosses:
    """Before a causal model's class: says so where TRL would leave the router losses out."""

    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and look for router losses that the trainer would lose.

        Raises:
            ValueError: under TRL's SFTTrainer, which minimises the model's loss, without
                `mor.trl.RouterLossMixin`.
        """
        alone = kwargs.get("fused_lm_head") and self.training and _collected.get() is None
        if not alone or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with collect_router_losses() as collected:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if any(bool(loss != 0) for loss in collected.losses):
            self._tell()
        return output

    def _tell(self) -> None:
        # TRL's trainers tag the models they train; several may have trained this one.
        trainer = (getattr(self, "model_tags", None) or [""])[-1]
        message = (
            f"TRL's {trainer.upper()}Trainer takes hidden states from the decoder and so leaves "
            f"the router losses out: write `class Mine(mor.trl.RouterLossMixin, {trainer.upper()}"
            "Trainer)`, or set their weights to 0"
        )
        if trainer == "sft":
            raise ValueError(message)
        logging.get_logger("mor").warning_once(message)
