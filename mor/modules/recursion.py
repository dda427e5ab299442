"""Recursion over packed tokens: the same block several times, on the tokens a router keeps.

The block is any callable `block(x, packing, step, rows) -> y` from rows [K, D] to rows [K, D],
including its residual stream; `rows` are their places among all N rows. It must accept zero rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import Packing
from mor.modules.routers import Router, RouterScore, aux_loss, balancing_loss, z_loss
from mor.ops import gather_tokens, group_rows, route_topk, scatter_tokens

__all__ = ["ExpertChoice", "RecursionOutput", "RecursionStep", "TokenChoice", "default_capacities"]

Block = Callable[[Tensor, Packing, int, Tensor], Tensor]


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


def default_capacities(num_recursions: int) -> list[float]:
    """(R - r) / R for recursion r = 0..R-1, as the paper: 1, 2/3, 1/3 for three recursions."""
    return [(num_recursions - r) / num_recursions for r in range(num_recursions)]


def _warmed_up(steps: Tensor, warmup: int) -> float:
    """Share of a warm-up that is left, 1 to 0 by a half cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, int(steps) / warmup)))


class ExpertChoice(nn.Module):
    """Expert-choice routing: each recursion step picks its tokens among those of the step before.

    `H_t <- H_t + g_t * f(H)_t` for the selected tokens, f the whole block with its residual stream.
    In training the k_r = max(1, int(c_r * T)) best tokens of every sequence of T tokens are selected,
    which looks at later tokens; in evaluation a token is selected if its logit is above 0 (0.5 on
    the sigmoid), so no result depends on a later token. While capacities are 1, every token is.

    Args:
        hidden_size: D.
        num_recursions: R.
        capacities: c_r, non-increasing, each in (0, 1]; default (R - r) / R.
        router_type, temperature, std: see `Router`.
        score: turns logits into gates.
        gating: "weighted", or "additive" for `H_t + f(H)_t`.
        aux: "loss" trains the router itself to predict its selection; "router" trains a separate
            mlp-free twin on detached states and uses it in evaluation; None does neither.
        eval_routing: "threshold", or "topk" to reproduce published numbers (looks at later tokens).
        capacity_warmup_steps: training forward calls over which capacities fall from 1 to c_r.

    Raises:
        ValueError: capacities that rise, leave (0, 1] or are not R; unknown options.

    Reference: MoR paper, section 2.2.1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_recursions: int,
        *,
        capacities: Sequence[float] | None = None,
        router_type: str = "linear",
        temperature: float = 1.0,
        std: float = 0.02,
        score: RouterScore = RouterScore("sigmoid", 0.1),  # noqa: B008 - frozen
        gating: str = "weighted",
        aux: str | None = "loss",
        use_z_loss: bool = False,
        eval_routing: str = "threshold",
        capacity_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.capacities = check_capacities(capacities, num_recursions)
        if gating not in ("weighted", "additive"):
            raise ValueError(f"router_gating: expected weighted or additive, got {gating!r}")
        if eval_routing not in ("threshold", "topk"):
            raise ValueError(f"eval_routing: expected threshold or topk, got {eval_routing!r}")
        if aux not in ("loss", "router", None):
            raise ValueError(f"router_aux: expected loss, router or None, got {aux!r}")
        if score.function == "softmax":
            raise ValueError("router_func: softmax needs several outputs; expert-choice has one")
        self.score, self.gating, self.aux, self.use_z_loss = score, gating, aux, use_z_loss
        self.eval_routing = eval_routing
        self.capacity_warmup_steps = capacity_warmup_steps
        self.routers = nn.ModuleList(
            Router(hidden_size, 1, router_type, temperature, std) for _ in range(num_recursions)
        )
        self.aux_routers = nn.ModuleList(
            Router(hidden_size, 1, router_type, 1.0, std)
            for _ in range(num_recursions if aux == "router" else 0)
        )
        self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64))
        self.metrics = RoutingMetrics(num_recursions)

    def forward(
        self, hidden: Tensor, packing: Packing, block: Block, keep_states: bool = False
    ) -> RecursionOutput:
        """Runs R recursion steps over hidden [N, D]; keep_states fills `before` and `after`."""
        capacities = self._capacities_now()
        depths = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        total = tuple(packing.lengths) if packing.lengths is not None else None
        current, steps = packing, []
        aux_losses, z_losses = [], []
        for step, router in enumerate(self.routers):
            candidates = hidden if step == 0 else gather_tokens(hidden, rows)
            logits = router(candidates).squeeze(-1)
            aux_logits = (
                self.aux_routers[step](candidates.detach()).squeeze(-1)
                if self.aux_routers
                else None
            )
            ranked = logits if aux_logits is None or self.training else aux_logits
            if capacities[step] == 1 and current is packing:
                local = torch.arange(hidden.shape[0], device=hidden.device)  # nothing to decide
            elif self.training or self.eval_routing == "topk":
                assert total is not None, (
                    "expert-choice training needs sequence lengths on the host"
                )
                local, current = self._select_topk(ranked, current, total, capacities[step])
            else:
                local, current = _select_above_threshold(ranked, current)
            self.metrics.update(step, ranked, local, rows, packing.positions)
            if self.aux == "loss":
                aux_losses.append(aux_loss(logits, local))
            elif aux_logits is not None:
                aux_losses.append(aux_loss(aux_logits, local))
            if self.use_z_loss:
                z_losses.append(z_loss(logits.unsqueeze(-1)))

            everything = local.shape[0] == candidates.shape[0]
            x = candidates if everything else gather_tokens(candidates, local)
            gates = self.score(logits if everything else gather_tokens(logits, local))
            rows = rows if everything else gather_tokens(rows, local)
            y = block(x, current, step, rows)
            gate = gates if self.gating == "weighted" else None
            before = hidden
            hidden = scatter_tokens(hidden, y, rows, gate)
            depths = depths.index_fill(0, rows, step + 1)
            gates = gates if gate is not None else torch.ones_like(gates)
            states = (before, hidden) if keep_states else (None, None)
            steps.append(RecursionStep(rows, logits, gates, aux_logits, *states))
        return RecursionOutput(
            hidden,
            depths,
            aux_loss=torch.stack(aux_losses).sum() if aux_losses else None,
            z_loss=torch.stack(z_losses).sum() if z_losses else None,
            steps=steps,
        )

    def _capacities_now(self) -> list[float]:
        if not self.training or self.capacity_warmup_steps == 0:
            return self.capacities
        left = _warmed_up(self.warmup_step, self.capacity_warmup_steps)
        self.warmup_step += 1
        return [c + (1 - c) * left for c in self.capacities]

    def _select_topk(
        self, logits: Tensor, packing: Packing, total: tuple[int, ...], capacity: float
    ) -> tuple[Tensor, Packing]:
        """The k best candidates of every sequence; k counts from its full length."""
        assert packing.lengths is not None
        # As the authors: int() of the float product, at least one token, never more than are there.
        wanted = [
            min(max(1, int(capacity * n)), have)
            for n, have in zip(total, packing.lengths, strict=True)
        ]
        if wanted == list(packing.lengths):
            return torch.arange(packing.num_rows, device=logits.device), packing
        scores = logits.detach()
        if len(set(wanted)) == 1:
            local = route_topk(scores, wanted[0], packing.cu_seqlens)
        else:
            k = torch.tensor(wanted, dtype=torch.int64).to(logits.device)
            local = route_topk(scores, k, packing.cu_seqlens, num_rows=sum(wanted))
        return local, packing.select(local, lengths=wanted)


def check_capacities(capacities: Sequence[float] | None, num_recursions: int) -> list[float]:
    """The capacities as a checked list; default (R - r) / R."""
    if capacities is None:
        return default_capacities(num_recursions)
    values = [float(c) for c in capacities]
    if len(values) != num_recursions:
        raise ValueError(
            f"capacities: expected one for each of the {num_recursions} recursions, got {values}"
        )
    if any(not 0 < c <= 1 for c in values):
        raise ValueError(f"capacities: expected values in (0, 1], got {values}")
    if any(b > a for a, b in zip(values[:-1], values[1:], strict=True)):
        raise ValueError(
            f"capacities: expected values that never rise (a token that left stays out), got {values}"
        )
    return values


def _select_above_threshold(logits: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """Candidates whose logit is above 0, and their packing. One host synchronisation."""
    grouped, offsets = group_rows(logits > 0, 2, packing.cu_seqlens)
    starts = offsets[packing.num_sequences :]
    local = grouped[int(starts[0]) :]
    return local, packing.select(local, cu_seqlens=(starts - starts[0]).to(torch.int32))


class TokenChoice(nn.Module):
    """Token-choice routing: one decision before the first recursion, causal by construction.

    A token of depth i leaves after recursion i with `x + g * f^i(x)`, g the score of its choice; as
    the authors' code, and unlike the paper's equation, there is no gate between recursions.

    Args:
        hidden_size: D.
        num_recursions: R.
        router_type, temperature, std: see `Router`.
        score: turns logits [N, R] into scores; the highest is chosen.
        gating: "weighted", or "additive" for `x + f^i(x)`.
        balancing: "loss", "loss_free" (a bias on the selection, see `update_bias`) or None.
        bias_update_rate: u of loss-free balancing.
        balance_warmup_steps: training forward calls in which every token takes all recursions.

    Reference: MoR paper, section 2.2.1.
    """

    bias: Tensor
    load: Tensor

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
        if gating not in ("weighted", "additive"):
            raise ValueError(f"router_gating: expected weighted or additive, got {gating!r}")
        if balancing not in ("loss", "loss_free", None):
            raise ValueError(
                f"router_balancing: expected loss, loss_free or None, got {balancing!r}"
            )
        self.num_recursions = num_recursions
        self.score, self.gating, self.balancing = score, gating, balancing
        self.use_z_loss, self.bias_update_rate = use_z_loss, bias_update_rate
        self.balance_warmup_steps = balance_warmup_steps
        self.router = Router(hidden_size, num_recursions, router_type, temperature, std)
        self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64))
        if balancing == "loss_free":
            self.register_buffer("bias", torch.zeros(num_recursions))
            self.register_buffer("load", torch.zeros(num_recursions), persistent=False)
        self.metrics = RoutingMetrics(num_recursions)

    def forward(
        self, hidden: Tensor, packing: Packing, block: Block, keep_states: bool = False
    ) -> RecursionOutput:
        """Runs up to R recursion steps over hidden [N, D]; keep_states fills `before`, `after`."""
        logits = self.router(hidden)
        scores = self.score(logits)
        choice = self._choose(scores)
        depths = choice + 1
        chosen = scores.gather(1, choice.unsqueeze(1)).squeeze(1)
        gates = chosen if self.gating == "weighted" else torch.ones_like(chosen)
        counts = torch.bincount(choice, minlength=self.num_recursions)
        if self.training and self.balancing == "loss_free":
            self.load += counts
        self.metrics.update_choice(scores, counts, choice, packing.positions)

        # One synchronisation a forward: how many tokens leave after each step.
        leaving = counts.tolist()
        x, current, out, steps = hidden, packing, hidden, []
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        for step in range(self.num_recursions):
            step_rows = rows
            x = block(x, current, step, rows)
            before, state = out, out.index_copy(0, rows, x) if keep_states else None
            if leaving[step] == rows.shape[0]:
                done, done_x = rows, x
                local = rows[:0]
                current = current.select(local, cu_seqlens=torch.zeros_like(current.cu_seqlens))
            else:
                stays = gather_tokens(depths, rows) > step + 1
                grouped, offsets = group_rows(stays, 2, current.cu_seqlens)
                starts = offsets[current.num_sequences :]
                local = grouped[leaving[step] :]
                current = current.select(local, cu_seqlens=(starts - starts[0]).to(torch.int32))
                leave = grouped[: leaving[step]]
                done, done_x = gather_tokens(rows, leave), gather_tokens(x, leave)
            out = scatter_tokens(out, done_x, done, gather_tokens(gates, done))
            states = (before, state) if keep_states else (None, None)
            steps.append(RecursionStep(step_rows, None, None, None, *states))
            if step + 1 < self.num_recursions:
                x, rows = gather_tokens(x, local), gather_tokens(rows, local)
        return RecursionOutput(
            out,
            depths,
            z_loss=z_loss(logits) if self.use_z_loss else None,
            balancing_loss=balancing_loss(scores, choice) if self.balancing == "loss" else None,
            steps=steps,
            logits=logits,
            gates=gates,
        )

    def _choose(self, scores: Tensor) -> Tensor:
        if self.training and self.balance_warmup_steps > 0:
            self.warmup_step += 1
            if int(self.warmup_step) <= self.balance_warmup_steps:
                last = self.num_recursions - 1
                return torch.full(scores.shape[:1], last, dtype=torch.int64, device=scores.device)
        biased = scores + self.bias if self.balancing == "loss_free" else scores
        return biased.detach().argmax(dim=-1)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Loss-free balancing: b_i += u * sign(mean load - load_i), then forgets the loads.

        Call it after every optimizer step (mor's Trainer does). The loads of all ranks are summed.
        """
        if self.balancing != "loss_free":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load)
        self.bias += self.bias_update_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()
