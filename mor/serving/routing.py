"""Routing of packed rows at different recursion steps, as the models route in evaluation."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import Float32Linear, Router
from mor.modules.token_choice import TokenChoice
from mor.serving.weights import in_tiles

__all__ = ["ExpertRouting", "TokenRouting"]


class ExpertRouting:
    """Expert-choice by threshold: whether each row takes its next recursion step, and its gate.

    A row's logit must be above its threshold, 0 by default. Steps of capacity 1 take every row.

    Args:
        module: the model's.
        deterministic: see `Product`.
    """

    def __init__(self, module: ExpertChoice, deterministic: bool = False) -> None:
        self.module, self.deterministic = module, deterministic
        self.num_recursions = len(module.routers)
        device = module.warmup_step.device
        steps = range(self.num_recursions)
        self.always = torch.tensor([module.capacities[s] == 1 for s in steps], device=device)
        self.shift: Tensor | None = None
        if module.random:
            self.shift = torch.tensor([module._random_threshold(s) for s in steps], device=device)
        self.own = _Stacked(list(module.routers))
        self.deciding = _Stacked(list(module.aux_routers)) if module.aux_routers else None

    def __call__(
        self,
        hidden: Tensor,
        steps: Tensor,
        positions: Tensor,
        thresholds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Routes rows before a recursion step.

        Args:
            hidden: [N, D] states.
            steps: [N] int64 the step, from 0, that each row would take; R: there is none.
            positions: [N] int64.
            thresholds: [N] float32 on the logits; None: 0.

        Returns:
            goes_on [N] bool and gates [N], factors of the step's result.
        """
        rows = hidden, steps, positions, thresholds
        return in_tiles(self._routed, *rows) if self.deterministic else self._routed(*rows)

    def _routed(
        self,
        hidden: Tensor,
        steps: Tensor,
        positions: Tensor,
        thresholds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        last = steps >= self.num_recursions
        steps = steps.clamp(max=self.num_recursions - 1)
        logits = self.own(hidden, steps, positions)
        ranked = logits if self.deciding is None else self.deciding(hidden, steps, positions)
        if self.shift is not None:
            ranked = ranked - self.shift[steps]
        goes_on = ranked > (0 if thresholds is None else thresholds)
        goes_on = (goes_on | self.always[steps]) & ~last
        return goes_on, self.module.score(logits)


class TokenRouting:
    """Token-choice: how many recursions each row takes, and its gate.

    Args:
        module: the model's.
        deterministic: see `Product`.
    """

    def __init__(self, module: TokenChoice, deterministic: bool = False) -> None:
        self.module, self.deterministic = module, deterministic
        self.outputs = torch.arange(module.num_recursions, device=module.warmup_step.device)

    def __call__(
        self, hidden: Tensor, positions: Tensor, max_recursions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Depths [N] int64 and gates [N] of rows [N, D] before the first recursion.

        Of a row with `max_recursions` the best of the depths up to it is chosen.
        """
        rows = hidden, positions, max_recursions
        return in_tiles(self._routed, *rows) if self.deterministic else self._routed(*rows)

    def _routed(
        self, hidden: Tensor, positions: Tensor, max_recursions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        module = self.module
        scores = module.score(module.router(hidden, positions))
        ranked = scores + module.bias if module.balancing == "loss_free" else scores
        if max_recursions is not None:
            above = self.outputs >= max_recursions.unsqueeze(1)
            ranked = ranked.masked_fill(above, -torch.inf)
        choice = ranked.argmax(dim=-1)
        gates = scores.gather(1, choice.unsqueeze(1)).squeeze(1)
        if module.gating == "additive":
            gates = torch.ones_like(gates)
        return choice + 1, gates


class _Stacked:
    """One router for each step, computed for rows of any step: linear ones in one product."""

    def __init__(self, routers: list[Any]) -> None:
        self.routers, self.weight = routers, None
        self.temperature = 1.0
        if all(_is_linear(router) for router in routers):
            self.temperature = routers[0].temperature
            weights = [router.layers[0].weight.detach() for router in routers]
            dtype = torch.promote_types(weights[0].dtype, torch.float32)
            self.weight = torch.cat(weights).to(dtype)

    def __call__(self, hidden: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        """Logits [N], of each row by the router of its step [N]."""
        if self.weight is not None:
            x = hidden.to(self.weight.dtype)
            x = x if self.temperature == 1.0 else x / self.temperature
            every = functional.linear(x, self.weight)
            return every.gather(1, steps.unsqueeze(1)).squeeze(1)
        logits: Tensor | None = None  # in the routers' dtype: float32 if they are random
        for step, router in enumerate(self.routers):
            rows = (steps == step).nonzero().squeeze(1)
            if rows.shape[0] > 0 or step == 0:
                found = router(hidden[rows], positions[rows]).squeeze(-1)
                logits = found.new_zeros(hidden.shape[0]) if logits is None else logits
                logits[rows] = found
        assert logits is not None
        return logits


def _is_linear(router: Any) -> bool:
    plain = isinstance(router, Router) and len(router.layers) == 1
    return plain and type(router.layers[0]) is Float32Linear
