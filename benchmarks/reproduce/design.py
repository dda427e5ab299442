"""Parts of an experiment: what it trains, measures and claims."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.reproduce.presets import Preset
from mor.training.race_results import ModelResult
from mor.training.trainer import MoRTrainer

__all__ = ["LOSS", "Claim", "Experiment", "Variant"]

#: The measured value that every training has: the loss of the held-out text, with causal routing.
LOSS = "validation_loss"


@dataclass(frozen=True)
class Variant:
    """One training. Experiments that name the same training share it, whatever they call it.

    Attributes:
        name: in tables and figures.
        options: of `MoRConfig`; None trains the dense model. Here `capacity_warmup_steps` counts
            optimiser steps, whatever the number of forwards in each.
        size: index of the preset's size.
        budget: index of the preset's FLOPs.
    """

    name: str
    options: Mapping[str, Any] | None
    size: int = -1
    budget: int = -1


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if one number is lower than another.

    Attributes:
        text: the sentence.
        lower: variant and measured value, `LOSS` for the loss of the causal model.
        higher: the same of what is to be worse.
        relative: the difference is a share of `higher`, for values whose unit says little.
    """

    text: str
    lower: tuple[str, str]
    higher: tuple[str, str]
    relative: bool = False

    def difference(self, lower: float, higher: float) -> float:
        """The difference of one seed, negative where the sentence holds."""
        return lower / higher - 1 if self.relative else lower - higher


def _nothing(trainer: MoRTrainer) -> dict[str, float]:
    return {}


def _alone(results: Sequence[ModelResult]) -> list[dict[str, float]]:
    return [{} for _ in results]


@dataclass(frozen=True)
class Experiment:
    """Trainings that differ in one thing.

    Attributes:
        name: what is typed.
        title: heading of its section.
        about: what is compared and what is held equal.
        equal: whether the variants get the same training tokens or the same FLOPs.
        variants: of a preset.
        claims: the paper's, and ours where it made none.
        measure: further numbers of a trained model; the keys are columns of the table.
        compare: numbers of a training beside the others of its seed, columns too. Where seconds
            are compared, all must have trained in one race (`timed`).
        timed: whether seconds are compared.
    """

    name: str
    title: str
    about: str
    equal: Literal["tokens", "FLOPs"]
    variants: Callable[[Preset], list[Variant]]
    claims: tuple[Claim, ...]
    measure: Callable[[MoRTrainer], dict[str, float]] = field(default=_nothing)
    compare: Callable[[Sequence[ModelResult]], list[dict[str, float]]] = field(default=_alone)
    timed: bool = False
