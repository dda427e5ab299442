"""Targets of a batch and of an optimizer step: what losses are divided and weighted by."""

from torch import Tensor

__all__ = ["at_least_one", "batch_share", "num_targets"]


def num_targets(labels: Tensor | None, shift_labels: Tensor | None = None) -> Tensor:
    """How many tokens of a batch have a target."""
    if shift_labels is not None:
        return (shift_labels != -100).sum()
    assert labels is not None
    return (labels[:, 1:] != -100).sum()


def at_least_one(items: Tensor | int) -> Tensor | int:
    """A divisor for sums over targets, which are 0 where there is none."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def batch_share(count: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """A batch's share of the targets of the optimizer step: the weight of its router loss.

    Args:
        count: its own targets; without any, the batch adds nothing.
        num_items_in_batch: those of the step; None for a batch that is the whole step.
    """
    if num_items_in_batch is None:
        return count > 0
    return count / at_least_one(num_items_in_batch)
