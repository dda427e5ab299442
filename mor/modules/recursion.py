"""Recursion over packed tokens: the same block several times, on the tokens a router keeps.

The block is any callable `block(x, packing, step, rows) -> y` from rows [K, D] to rows [K, D],
including its residual stream; `rows` are their places among all N rows. It must accept zero rows.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.export import register_dataclass

from mor.modules.packing import Packing
from mor.ops.scatter_tokens import scatter_tokens, scatter_tokens_

__all__ = [
    "Block",
    "LastRouting",
    "RecursionOutput",
    "RecursionStep",
    "add_rows",
    "check_capacities",
    "default_capacities",
    "is_recomputing",
]

Block = Callable[[Tensor, Packing, int, Tensor], Tensor]


def is_recomputing() -> bool:
    """Whether this call repeats an earlier forward inside a backward pass, as checkpoints do."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def add_rows(
    step: int, states: Tensor, updates: Tensor, rows: Tensor, gate: Tensor | None, keep: bool
) -> Tensor:
    """`scatter_tokens` of a step's updates into the states [N, D].

    In place where it can be: after the first step the states are the recursion's own, and without
    gradients nothing but a caller that asked for them (`keep`) needs the older ones.
    """
    own = step > 0 and not keep and not torch.is_grad_enabled()
    return (scatter_tokens_ if own else scatter_tokens)(states, updates, rows, gate)


@dataclass(frozen=True)
class RecursionStep:
    """What one recursion step did.

    Attributes:
        rows: [K] int64 packed rows that took part, ascending.
        logits: expert-choice: [C] router logits of the candidates; token-choice: None.
        gates: [K] float32 factors (expert-choice), None for token-choice.
        aux_logits: [C] logits of the auxiliary router, where there is one.
        before, after: [N, D] states around the step, if asked for.
    """

    rows: Tensor
    logits: Tensor | None = None
    gates: Tensor | None = None
    aux_logits: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None


@dataclass
class RecursionOutput:
    """Result of the routed middle of a model.

    Attributes:
        hidden: [N, D].
        depths: [N] int64 recursion steps each token took.
        aux_loss, z_loss, balancing_loss: unscaled router losses; None where not used.
        steps: one per recursion.
        logits: [N, R] token-choice router logits.
        gates: [N] token-choice factors.
    """

    hidden: Tensor
    depths: Tensor
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    balancing_loss: Tensor | None = None
    steps: list[RecursionStep] = field(default_factory=list)
    logits: Tensor | None = None
    gates: Tensor | None = None


# FSDP2 finds the tensors of an output by torch's pytrees, and torch.export returns them so.
register_dataclass(RecursionStep, serialized_type_name="mor.RecursionStep")
register_dataclass(RecursionOutput, serialized_type_name="mor.RecursionOutput")


class LastRouting:
    """Where a module leaves how it routed its last call, a `RecursionOutput` for one.

    Each thread sees that of its own calls. It is no state of the module: copies and pickles of a
    module begin without. The `threading.local` is an attribute, not a base class: what a compiled
    module writes to an instance of a subclass is lost (PyTorch 2.13).
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def output(self) -> Any:
        """The result; None before the first call."""
        return getattr(self._local, "output", None)

    @output.setter
    def output(self, value: Any) -> None:
        self._local.output = value

    @property
    def token_depths(self) -> Tensor | None:
        """[B, S] int64 recursions (or experts) of each token; None before the first call."""
        return getattr(self._local, "token_depths", None)

    @token_depths.setter
    def token_depths(self, value: Tensor | None) -> None:
        self._local.token_depths = value

    def __reduce__(self) -> Any:
        return LastRouting, ()


def default_capacities(num_recursions: int) -> list[float]:
    """(R - r) / R for recursion r = 0..R-1, as the paper: 1, 2/3, 1/3 for three recursions."""
    return [(num_recursions - r) / num_recursions for r in range(num_recursions)]


def check_capacities(capacities: Sequence[float] | None, num_recursions: int) -> list[float]:
    """The capacities as a checked list; default (R - r) / R."""
    if num_recursions < 1:
        raise ValueError(f"num_recursions: expected at least 1, got {num_recursions}")
    if capacities is None:
        return default_capacities(num_recursions)
    values = [float(c) for c in capacities]
    if len(values) != num_recursions:
        raise ValueError(
            f"capacities: expected one for each of the {num_recursions} recursions, got {values}"
        )
    if any(not 0 < c <= 1 for c in values):
        raise ValueError(f"capacities: expected values in (0, 1], got {values}")
    if any(b > a for a, b in pairwise(values)):
        raise ValueError(
            "capacities: expected non-increasing values (a token that exited does not return), got "
            f"{values}"
        )
    return values
