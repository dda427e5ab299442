"""Routing metrics, gathered during forward calls and read between log lines."""

import torch
from torch import Tensor

__all__ = ["RoutingMetrics"]

#: Positions told apart by `dead_tokens`; later ones share a place.
_POSITIONS = 1 << 14


class RoutingMetrics:
    """Counts how tokens are routed since the last `reset`; sums stay on the device until `compute`.

    Metrics (paper, section 4.2 and appendix): `selected_share_r`, share of all tokens that take
    recursion r (1-based); `sampling_accuracy`, share of candidates for which the threshold agrees
    with the selection by rank (expert-choice in training); `entropy`, of the mean selection
    probabilities; `dead_tokens`, share of positions that never reached the last recursion;
    `max_vio`, (largest load - mean load) / mean load (token-choice).
    """

    def __init__(self, num_recursions: int) -> None:
        self.num_recursions = num_recursions
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._tokens = 0
        self._selected: list[Tensor | int] = [0] * self.num_recursions
        self._agree: Tensor | int = 0
        self._candidates = 0
        self._probability: Tensor | None = None
        self._load: Tensor | None = None
        self._reached: Tensor | None = None

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
        self._selected[step] += local.shape[0]
        if by_rank:
            predicted = logits > 0
            selected = torch.zeros_like(predicted).index_fill(0, local, True)
            self._agree = self._agree + (predicted == selected).sum()
            self._candidates += logits.shape[0]
        if self._probability is None:
            self._probability = logits.new_zeros(self.num_recursions)
        self._probability[step] += logits.sigmoid().sum()
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
        at_least = counts.flip(0).cumsum(0).flip(0)
        for step in range(self.num_recursions):
            self._selected[step] = self._selected[step] + at_least[step]
        share = scores.sum(dim=0)
        self._probability = share if self._probability is None else self._probability + share
        self._load = counts if self._load is None else self._load + counts
        self._reach(positions, choice == self.num_recursions - 1)

    def _reach(self, positions: Tensor, reached: Tensor) -> None:
        # Fixed sizes throughout, so that the host reads nothing.
        if self._reached is None:
            self._reached = torch.zeros(2, _POSITIONS, dtype=torch.bool, device=positions.device)
        places = positions % _POSITIONS
        hits = torch.zeros(_POSITIONS, device=positions.device)
        self._reached[0, places] = True
        self._reached[1] |= hits.index_add(0, places, reached.to(hits.dtype)) > 0

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
        places = (2, _POSITIONS)
        parts = [
            torch.tensor([self._tokens, self._candidates, float(self._load is not None)]),
            torch.as_tensor(self._agree).reshape(1),
            torch.stack([torch.as_tensor(selected) for selected in self._selected]),
            torch.zeros(count) if self._probability is None else self._probability,
            torch.zeros(count) if self._load is None else self._load,
            torch.zeros(places) if self._reached is None else self._reached,
        ]
        flat = torch.cat([part.to(device, torch.float64).reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat)
        sizes = [3, 1, count, count, count, 2 * _POSITIONS]
        counts, agree, selected, probability, load, reached = flat.split(sizes)
        tokens, candidates, routers = counts.tolist()
        self._tokens, self._candidates = int(tokens), int(candidates)
        self._agree, self._selected, self._probability = agree, list(selected), probability
        self._load = load if routers else None
        self._reached = reached.reshape(places) > 0

    def compute(self) -> dict[str, float]:
        """The metrics since the last reset; empty if there was no forward."""
        if self._tokens == 0:
            return {}
        metrics = {
            f"selected_share_{step + 1}": float(count) / self._tokens
            for step, count in enumerate(self._selected)
        }
        if self._candidates:
            metrics["sampling_accuracy"] = float(self._agree) / self._candidates
        if self._probability is not None:
            share = self._probability / self._probability.sum().clamp(min=1e-30)
            metrics["entropy"] = float(-(share * share.clamp(min=1e-30).log()).sum())
        if self._reached is not None:
            seen, reached = self._reached.sum(dim=1).tolist()
            metrics["dead_tokens"] = 1 - reached / max(seen, 1)
        if self._load is not None:
            load = self._load.double()
            metrics["max_vio"] = float((load.max() - load.mean()) / load.mean())
        return metrics
