"""Token-choice routing: each token decides its depth before the first recursion."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import Packing
from mor.modules.recursion import (
    Block,
    RecursionOutput,
    RecursionStep,
    add_rows,
    is_recomputing,
)
from mor.modules.routers import (
    GATINGS,
    RandomRouter,
    Router,
    RouterScore,
    apply_gate,
    balancing_loss,
    count_choices,
    refuse_nan,
    z_loss,
)
from mor.ops.gather_tokens import gather_tokens
from mor.ops.group_rows import group_rows

__all__ = ["TokenChoice"]


class TokenChoice(nn.Module):
    """Token-choice routing: one decision before the first recursion, causal by construction.

    A token of depth i exits after recursion i with `x + g * f^i(x)`, g the score of its choice; as
    the authors' code, and unlike the paper's equation, there is no gate between recursions.

    Args:
        hidden_size: the width D.
        num_recursions: the number R.
        router_type, temperature, std: see `Router`; "random" scores with a `RandomRouter` and has
            neither balancing nor z-loss.
        score: turns logits [N, R] into scores; the highest is chosen.
        gating: "weighted", "additive" for `x + f^i(x)` or "residual" for `x + g (f^i(x) - x)`.
        balancing: "loss", "loss_free" (a bias on the selection, see `update_bias`) or None.
        bias_update_rate: u of loss-free balancing.
        balance_warmup_steps: training forward calls in which every token takes all recursions.

    Reference: MoR paper, section 2.2.1.
    """

    bias: Tensor
    warmup_step: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_recursions: int,
        *,
        router_type: str = "linear",
        temperature: float = 1.0,
        std: float = 0.02,
        score: RouterScore = RouterScore("softmax", 1.0),  # noqa: B008 - frozen
        gating: str = "weighted",
        balancing: str | None = "loss",
        bias_update_rate: float = 0.001,
        use_z_loss: bool = False,
        balance_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if gating not in GATINGS:
            raise ValueError(f"gating: expected one of {GATINGS}, got {gating!r}")
        if balancing not in ("loss", "loss_free", None):
            raise ValueError(f"balancing: expected loss, loss_free or None, got {balancing!r}")
        if num_recursions < 1:
            raise ValueError(f"num_recursions: expected at least 1, got {num_recursions}")
        self.num_recursions = num_recursions
        self.random = router_type == "random"
        self.score = RouterScore("none", score.alpha) if self.random else score
        self.gating = gating
        self.balancing = balancing = None if self.random else balancing
        self.use_z_loss = use_z_loss and not self.random
        self.bias_update_rate = bias_update_rate
        self.balance_warmup_steps = balance_warmup_steps
        self.router = (
            RandomRouter(num_recursions)
            if self.random
            else Router(hidden_size, num_recursions, router_type, temperature, std)
        )
        self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64))
        if balancing == "loss_free":
            self.register_buffer("bias", torch.zeros(num_recursions, dtype=torch.float32))
            # No buffer: DDP would replace it by that of the first process before each forward.
            self.load = torch.zeros(num_recursions, dtype=torch.int64, device="cpu")
        self.metrics = RoutingMetrics(num_recursions)

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        block: Block,
        keep_states: bool = False,
        generating: bool = False,
    ) -> RecursionOutput:
        """Runs up to R recursion steps; see `ExpertChoice.forward`."""
        learns = self.training and not generating
        counted = not generating and not is_recomputing()
        logits = self.router(hidden, packing.positions, learns)
        scores = self.score(logits)
        warming_up = learns and self._is_warming_up(counted)
        choice = self._choose(scores, warming_up)
        depths = choice + 1
        chosen = scores.gather(1, choice.unsqueeze(1)).squeeze(1)
        gates = torch.ones_like(chosen) if self.gating == "additive" else chosen
        counts = count_choices(choice, self.num_recursions)
        if counted:
            if learns and self.balancing == "loss_free" and not warming_up:
                self.load = self.load.to(counts.device) + counts
            self.metrics.update_choice(scores, counts, choice, packing.positions)

        active = _active_tokens(counts, hidden.shape[0])
        x, current, out, steps = hidden, packing, hidden, []
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        for step in range(self.num_recursions):
            x = block(x, current, step, rows)
            states = (out, out.index_copy(0, rows, x)) if keep_states else (None, None)
            steps.append(RecursionStep(rows, None, None, None, *states))
            done, done_x = rows, x
            if step + 1 < self.num_recursions:
                stays = gather_tokens(depths, rows) > step + 1
                grouped, offsets = group_rows(stays, 2, current.cu_seqlens)
                # One gather for both, cut: backward joins two gradients instead of adding them.
                cut = [active[step] - active[step + 1], active[step + 1]]
                starts = offsets[current.num_sequences :]
                cu_seqlens = (starts - starts[0]).to(torch.int32)
                current = current.select(grouped[cut[0] :], cu_seqlens=cu_seqlens)
                done_x, x = gather_tokens(x, grouped).split(cut)
                done, rows = gather_tokens(rows, grouped).split(cut)
            done_gates = gather_tokens(gates, done)
            # A token that exits still shows, in `out`, what went into the first recursion.
            entered = gather_tokens(out, done) if self.gating == "residual" else done_x
            done_x, _ = apply_gate(self.gating, entered, done_x, done_gates)
            out = add_rows(step, out, done_x, done, done_gates, keep_states)
        return RecursionOutput(
            out,
            depths,
            z_loss=z_loss(logits) if self.use_z_loss else None,
            balancing_loss=balancing_loss(scores, choice) if self.balancing == "loss" else None,
            steps=steps,
            logits=logits,
            gates=gates,
        )

    def _is_warming_up(self, counted: bool) -> bool:
        """Counts a call that learns, once; whether it still belongs to the warm-up."""
        if self.balance_warmup_steps == 0:
            return False
        if counted:
            self.warmup_step += 1
        return int(self.warmup_step) <= self.balance_warmup_steps

    def _choose(self, scores: Tensor, warming_up: bool) -> Tensor:
        if warming_up:
            last = self.num_recursions - 1
            return torch.full(scores.shape[:1], last, dtype=torch.int64, device=scores.device)
        refuse_nan(scores, "TokenChoice")
        biased = scores + self.bias if self.balancing == "loss_free" else scores
        return biased.detach().argmax(dim=-1)

    def _apply(self, fn: Any, recurse: bool = True) -> "TokenChoice":
        """Moves the module, and keeps the bias in float32: bfloat16 would round its steps away."""
        kept = self._buffers.get("bias")
        super()._apply(fn, recurse)
        moved = self._buffers.get("bias")
        if kept is not None and moved is not None and moved.dtype != kept.dtype:
            self.bias = kept.to(moved.device)
        return self

    @torch.no_grad()
    def update_bias(self) -> None:
        """Loss-free balancing: b_i += u * sign(mean load - load_i), then forgets the loads.

        Call it after every optimizer step (mor's Trainer does), in all processes: their loads are
        summed.
        """
        if self.balancing != "loss_free":
            return
        self.load = self.load.to(self.bias.device)  # still on the CPU if a warm-up counted nothing
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load)
        load = self.load.double()
        self.bias += self.bias_update_rate * torch.sign(load.mean() - load).to(self.bias.dtype)
        self.load = torch.zeros_like(self.load)


def _active_tokens(counts: Tensor, num_tokens: int) -> list[int]:
    """How many tokens take each step, from how many choose each. One synchronisation a forward.

    Under torch.compile they are symbols; the checks tell it what it needs to slice by them.
    """
    active: list[int] = counts.flip(0).cumsum(0).flip(0).tolist()
    active[0] = num_tokens
    for more, fewer in pairwise(active):
        torch._check(fewer >= 0)
        torch._check(fewer <= more)
    return active
