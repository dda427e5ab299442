"""Routing metrics, gathered during forward calls and read between log lines."""

import torch
from torch import Tensor

__all__ = ["RoutingMetrics"]

#: Positions told apart by `dead_tokens`; later ones share a place.
_POSITIONS = 1 << 14


class RoutingMetrics:
    """Counts how tokens are routed since the last `reset`; sums stay on the device until `compute`.

    The routers call `update` and `update_choice` in every forward; whoever logs calls `compute`,
    and then `reset`.

    Metrics (paper, section 4.2 and appendix): `selected_share_r`, share of all tokens that take
    recursion r (1-based); `sampling_accuracy`, share of candidates for which the threshold agrees
    with the selection by rank (expert-choice in training); `entropy`, of the mean selection
    probabilities; `dead_tokens`, share of positions that never reached the last recursion;
    `max_vio`, (largest load - mean load) / mean load (token-choice).
    """

    def __init__(self, num_recursions: int) -> None:
        self.num_recursions = num_recursions
        self.reset()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Copies and pickles begin anew: what was counted is no part of a model."""
        return RoutingMetrics, (self.num_recursions,)

    def reset(self) -> None:
        """Forgets everything."""
        self._tokens = self._candidates = 0
        self._sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        """Adds to a running sum, on the device of the newest call.

        Never in place: a sum that was made in inference mode could not be updated outside it.
        """
        old = self._sums.get(name)
        if old is not None and old.device != value.device:  # the model was moved
            old = None if old.is_meta else old.to(value.device)
        self._sums[name] = value if old is None else old + value

    @torch.no_grad()
    def update(
        self,
        step: int,
        logits: Tensor,
        local: Tensor,
        rows: Tensor,
        positions: Tensor,
        by_rank: bool,
    ) -> None:
        """Expert-choice, one recursion step.

        Args:
            step: r, from 0.
            logits: [C] of the candidates.
            local: [K] candidates that were selected.
            rows: [C] packed rows of the candidates.
            positions: [N] of all packed rows.
            by_rank: they were selected as in training, so that the threshold may disagree.
        """
        if torch.compiler.is_compiling():
            return
        if step == 0:
            self._tokens += positions.shape[0]
        steps = torch.arange(self.num_recursions, device=logits.device) == step
        self._add("selected", steps * local.shape[0])
        if by_rank:
            predicted = logits > 0
            selected = torch.zeros_like(predicted).index_fill(0, local, True)
            self._add("agree", (predicted == selected).sum())
            self._candidates += logits.shape[0]
        self._add("probability", steps * logits.float().sigmoid().sum())
        if step == self.num_recursions - 1:
            never = torch.zeros(positions.shape[0], dtype=torch.bool, device=positions.device)
            self._reach(positions, never.index_fill(0, rows[local], True))

    @torch.no_grad()
    def update_choice(
        self, scores: Tensor, counts: Tensor, choice: Tensor, positions: Tensor
    ) -> None:
        """Token-choice: scores [N, R], counts [R] tokens of each depth, choice [N]."""
        if torch.compiler.is_compiling():
            return
        self._tokens += scores.shape[0]
        self._add("selected", counts.flip(0).cumsum(0).flip(0))
        self._add("probability", scores.float().sum(dim=0))
        self._add("load", counts)
        self._reach(positions, choice == self.num_recursions - 1)

    def _reach(self, positions: Tensor, reached: Tensor) -> None:
        # Fixed sizes throughout, so that the host reads nothing.
        places = positions % _POSITIONS
        seen = torch.zeros(2, _POSITIONS, dtype=torch.int32, device=positions.device)
        seen[0].index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        seen[1].index_add_(0, places, reached.to(torch.int32))
        self._add("reached", seen > 0)  # whose sum is "or"

    @torch.no_grad()
    def sum_over_processes(self, device: torch.device) -> None:
        """Adds up what all processes counted; all must call it, before `compute`.

        Args:
            device: where the process group communicates.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if self.num_recursions == 0:
            return  # a model without a router
        count = self.num_recursions
        shapes = {
            "agree": (),
            "selected": (count,),
            "probability": (count,),
            "load": (count,),
            "reached": (2, _POSITIONS),
        }
        found = [float(name in self._sums) for name in shapes]
        parts = [torch.tensor([self._tokens, self._candidates, *found])]
        parts += [self._sums.get(name, torch.zeros(shape)) for name, shape in shapes.items()]
        flat = torch.cat([part.to(device, torch.float64).reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat)
        counts, *sums = flat.split([part.numel() for part in parts])
        tokens, candidates, *found = counts.tolist()
        self._tokens, self._candidates = int(tokens), int(candidates)
        self._sums = {
            name: total.reshape(shape)
            for (name, shape), total, there in zip(shapes.items(), sums, found, strict=True)
            if there
        }

    def compute(self) -> dict[str, float]:
        """The metrics since the last reset; empty if there was no forward."""
        if self._tokens == 0:
            return {}
        sums = {name: total.double().cpu() for name, total in self._sums.items()}
        metrics = {
            f"selected_share_{step + 1}": float(count) / self._tokens
            for step, count in enumerate(sums["selected"])
        }
        if self._candidates:
            metrics["sampling_accuracy"] = float(sums["agree"]) / self._candidates
        share = sums["probability"] / sums["probability"].sum().clamp(min=1e-30)
        metrics["entropy"] = float(-(share * share.clamp(min=1e-30).log()).sum())
        if "reached" in sums:
            seen, reached = (sums["reached"] > 0).sum(dim=1).tolist()
            metrics["dead_tokens"] = 1 - reached / max(seen, 1)
        if "load" in sums:
            load = sums["load"]
            metrics["max_vio"] = float((load.max() - load.mean()) / load.mean())
        return metrics
