"""Expert gates: which experts each token takes, and so how many."""

import math
import struct
from typing import Any

import torch
from torch import Tensor, nn

from mor.modules.recursion import is_recomputing
from mor.modules.routers import Router
from mor.ops.route_threshold import route_threshold

__all__ = ["GATES", "ExpertGate"]

#: Each gate and its default threshold; an absolute one is the even share, 1 / num_experts.
_THRESHOLDS = {"row_quantile": 0.5, "batch_quantile": 0.5, "absolute": None, "mass": 0.5}

GATES = tuple(_THRESHOLDS)

#: The running threshold is the mean of that many batches at first, and then an average of them
#: with this weight on the newest.
_SMALLEST_UPDATE = 0.01


class ExpertGate(nn.Module):
    """Decides for each token which experts it takes.

    With z the router's logits and g = softmax((z + noise) / temperature), a token takes:

    - "row_quantile", the published gate: experts with g above the quantile `threshold` of the
      token's own g. Such a cut is one by rank, so **every token takes the same number of experts**,
      `fixed_count` (fewer only where g ties); noise changes which ones.
    - "batch_quantile": g above the quantile of all g in the batch. The number of experts varies,
      but a token's result depends on its batch. So evaluation uses a running mean of the training
      batches' thresholds, as batch norm does (1 / E before any training): there a token's result
      depends on that token alone.
    - "absolute": g above `threshold`.
    - "mass": the fewest best experts whose g add up to `threshold` (top-p).

    All but the first vary with the token; all but "batch_quantile" look at that token alone.

    Args:
        hidden_size: the width D.
        num_experts: the number E.
        gate: one of `GATES`.
        threshold: of the gate, in [0, 1]. Default 0.5, and 1 / E for "absolute" (ours: what the
            paper uses we have not seen).
        min_k: where fewer experts pass, the best `min_k` are taken; 1 in the paper.
        max_k: at most so many are taken; None: no bound.
        noise: standard deviation of the Gaussian noise on the logits in training (paper: 0.1).
        temperature: paper: 0.5.
        std: standard deviation of the router's initial weights.

    Attributes:
        fixed_count: number of experts of every token, for "row_quantile"; else None.

    Raises:
        ValueError: an option with a value it does not take.

    Reference: DynaMoE (arXiv 2603.01697), dynamic token-level expert activation. Where the noise
    enters is our reading.
    """

    running_threshold: Tensor
    num_batches: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        gate: str = "mass",
        threshold: float | None = None,
        min_k: int = 1,
        max_k: int | None = None,
        noise: float = 0.1,
        temperature: float = 0.5,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        if gate not in _THRESHOLDS:
            raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
        if threshold is None:
            threshold = _THRESHOLDS[gate] or 1 / num_experts
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
        if not 0 <= min_k <= num_experts:
            raise ValueError(
                f"min_k: expected 0 to num_experts = {num_experts} experts, got {min_k}"
            )
        if max_k is not None and not max(min_k, 1) <= max_k:
            raise ValueError(
                f"max_k: expected None or at least {max(min_k, 1)} (min_k = {min_k}), got {max_k}"
            )
        if not noise >= 0:
            raise ValueError(f"noise: expected a number of at least 0, got {noise}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.num_experts, self.gate, self.threshold = num_experts, gate, float(threshold)
        self.min_k, self.max_k = min_k, num_experts if max_k is None else min(max_k, num_experts)
        self.noise, self.temperature = noise, temperature
        self.router = Router(hidden_size, num_experts, std=std)
        self.fixed_count: int | None = None
        if gate == "row_quantile":
            self.fixed_count = min(max(self._above_quantile(), min_k), self.max_k)
        if gate == "batch_quantile":
            even = torch.tensor(1 / num_experts, dtype=torch.float32)
            self.register_buffer("running_threshold", even)
            self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, is_token: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
        """Gates and choices of tokens [N, D].

        Args:
            x: [N, D].
            is_token: [N] bool; pads take no expert. None: all are tokens.
            exact: whether the number of rows may depend on data. Else there are as many as there
                could be, and -1 fills the end.

        Returns:
            g [N, E] in float32, and the places of the experts that are taken in g laid out flat,
            ascending.
        """
        gates = self._gates(x)
        return gates, self._choose(gates.detach(), is_token, exact)

    def _gates(self, x: Tensor) -> Tensor:
        """[N, E] softmax of the logits, noisy in training, in float32."""
        logits = self.router(x)
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        with torch.autocast(x.device.type, enabled=False):
            return (logits / self.temperature).softmax(dim=-1)

    @torch.no_grad()
    def _choose(self, gates: Tensor, is_token: Tensor | None, exact: bool) -> Tensor:
        num_tokens, num_experts = gates.shape
        flat, steps = gates.reshape(-1), torch.arange(num_tokens + 1, device=gates.device)
        candidates = None if is_token is None else is_token.repeat_interleave(num_experts)
        kind = self.gate
        threshold: float | Tensor = self.threshold
        if self.gate == "row_quantile":
            kind = "quantile"
        elif self.gate == "batch_quantile":
            cut = self._batch_threshold(flat, candidates)
            kind, threshold = "absolute", cut.expand(num_tokens).contiguous()
        most = self.max_k if self.fixed_count is None else self.fixed_count
        rows, _ = route_threshold(
            flat,
            threshold,
            (steps * num_experts).to(torch.int32),
            kind=kind,
            min_k=self.min_k,
            max_k=self.max_k,
            candidates=candidates,
            max_rows=None if exact else num_tokens * most,
        )
        return rows

    def _batch_threshold(self, flat: Tensor, candidates: Tensor | None) -> Tensor:
        """The cut of the batch in training, which the running one follows; else that one."""
        if not self.training or flat.shape[0] == 0:
            return self.running_threshold
        everything = torch.arange(2, dtype=torch.int32, device=flat.device) * flat.shape[0]
        above, _ = route_threshold(
            flat,
            self.threshold,
            everything,
            kind="quantile",
            candidates=candidates,
            max_rows=flat.shape[0],
        )
        # g above the interpolated quantile is g above the largest value that is not above it.
        below = torch.ones(flat.shape[0] + 1, dtype=torch.bool, device=flat.device)
        below.index_fill_(0, torch.where(above < 0, flat.shape[0], above), False)
        below = below[:-1] if candidates is None else below[:-1] & candidates
        cut = torch.where(below, flat, 0).amax()
        if not is_recomputing():
            weight = (1 / (self.num_batches + 1)).clamp(min=_SMALLEST_UPDATE)
            self.running_threshold.lerp_(cut.float(), weight)
            self.num_batches += 1
        return cut

    def _above_quantile(self) -> int:
        """How many of E distinct numbers are above their quantile.

        Interpolated, the quantile lies at place h = threshold * (E - 1) of the sorted numbers, so
        those above are the ones at places over floor(h). The operator has h in the numbers' dtype.
        """
        last = self.num_experts - 1
        place = _as_float32(_as_float32(self.threshold) * last)
        return last - min(math.floor(place), math.floor(self.threshold * last))

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertGate":
        """Moves the module, and leaves the running threshold in float32, whatever the model's."""
        kept = self._buffers.get("running_threshold")
        super()._apply(fn, recurse)
        moved = self._buffers.get("running_threshold")
        if kept is not None and moved is not None and moved.dtype != kept.dtype:
            self.running_threshold = kept.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Options for `print(model)`."""
        most = "" if self.max_k == self.num_experts else f", max_k={self.max_k}"
        return f"{self.gate}, threshold={self.threshold:g}, min_k={self.min_k}{most}"


def _as_float32(value: float) -> float:
    """The nearest float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
