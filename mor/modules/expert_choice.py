"""Expert-choice routing: each recursion step picks its tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import Packing
from mor.modules.recursion import (
    Block,
    RecursionOutput,
    RecursionStep,
    add_rows,
    check_capacities,
    is_recomputing,
)
from mor.modules.routers import (
    GATINGS,
    RandomRouter,
    Router,
    RouterScore,
    apply_gate,
    aux_loss,
    refuse_nan,
    z_loss,
)
from mor.ops.gather_tokens import gather_tokens
from mor.ops.group_rows import group_rows
from mor.ops.route_topk import route_topk

__all__ = ["ExpertChoice"]


class ExpertChoice(nn.Module):
    """Expert-choice routing: each recursion step picks its tokens among those of the step before.

    `H_t <- H_t + g_t * f(H)_t` for the selected tokens, f the whole block with its residual stream.
    In training the k_r = max(1, int(c_r * T)) best tokens of every sequence of T tokens are
    selected, which looks at later tokens; in evaluation a token is selected if its logit is above 0
    (0.5 on the sigmoid), so no result depends on a later token. While capacities are 1, every token
    is.

    Args:
        hidden_size: the width D.
        num_recursions: the number R.
        capacities: c_r, non-increasing, each in (0, 1]; default (R - r) / R.
        router_type, temperature, std: see `Router`; "random" scores with a `RandomRouter`, has
            neither aux nor z-loss, and takes its share of the tokens in evaluation.
        score: turns logits into gates.
        gating: "weighted", "additive" for `H_t + f(H)_t` or "residual" for
            `H_t + g_t (f(H)_t - H_t)`.
        aux: "loss" trains the router itself to predict its selection; "router" trains a second
            router of the same type on detached states, which decides in causal evaluation; None
            does neither.
        train_routing: "topk", or "threshold" to select in training as in evaluation: what a trainer
            needs that compares the two (DPO, KTO). The router still learns the k best tokens.
        eval_routing: "threshold", or "topk" to reproduce published numbers (looks at later tokens).
        capacity_warmup_steps: training forward calls over which capacities decrease from 1 to c_r.
            With
            a checkpoint around the module, a backward pass must follow each of these calls: the
            recomputation takes the capacities of the last one.

    Raises:
        ValueError: capacities that increase, are outside (0, 1] or are not R; unknown options.

    Reference: MoR paper, section 2.2.1.
    """

    warmup_step: Tensor

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
        train_routing: str = "topk",
        eval_routing: str = "threshold",
        capacity_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.capacities = check_capacities(capacities, num_recursions)
        if gating not in GATINGS:
            raise ValueError(f"gating: expected one of {GATINGS}, got {gating!r}")
        for name, value in (("train_routing", train_routing), ("eval_routing", eval_routing)):
            if value not in ("threshold", "topk"):
                raise ValueError(f"{name}: expected threshold or topk, got {value!r}")
        if aux not in ("loss", "router", None):
            raise ValueError(f"aux: expected loss, router or None, got {aux!r}")
        if score.function == "softmax":
            raise ValueError("score: softmax needs several outputs; expert-choice has one")
        self.random = router_type == "random"
        self.score = RouterScore("none", score.alpha) if self.random else score
        self.gating = gating
        self.aux = None if self.random else aux
        self.use_z_loss = use_z_loss and not self.random
        self.train_routing, self.eval_routing = train_routing, eval_routing
        self.capacity_warmup_steps = capacity_warmup_steps
        self.routers = nn.ModuleList(
            RandomRouter(1, step)
            if self.random
            else Router(hidden_size, 1, router_type, temperature, std)
            for step in range(num_recursions)
        )
        self.aux_routers = nn.ModuleList(
            Router(hidden_size, 1, router_type, 1.0, std)
            for _ in range(num_recursions if self.aux == "router" else 0)
        )
        self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64))
        self.metrics = RoutingMetrics(num_recursions)

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        block: Block,
        keep_states: bool = False,
        generating: bool = False,
    ) -> RecursionOutput:
        """Runs R recursion steps.

        Args:
            hidden: [N, D].
            packing: their sequences.
            block: see `mor.modules.recursion`.
            keep_states: fill `before` and `after` of the steps.
            generating: route as in evaluation and count nothing, whatever the module's mode.
        """
        learns = self.training and not generating
        counts = not generating and not is_recomputing()
        capacities = self._capacities_now(counts) if learns else self.capacities
        by_rank = (self.train_routing if learns else self.eval_routing) == "topk"
        depths = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        total = tuple(packing.lengths) if packing.lengths is not None else None
        current, steps = packing, []
        aux_losses, z_losses = [], []
        for step, router in enumerate(self.routers):
            candidates = hidden if step == 0 else gather_tokens(hidden, rows)
            logits = router(candidates, current.positions, learns).squeeze(-1)
            aux_logits = (
                self.aux_routers[step](candidates.detach()).squeeze(-1)
                if self.aux_routers
                else None
            )
            before_selection = current
            # Where later tokens are unknown the auxiliary router decides, if there is one.
            decides = logits if aux_logits is None else aux_logits
            ranked = logits if by_rank else decides
            if self.random:
                ranked = ranked - self._random_threshold(step)
            target: Tensor | None = None  # what the router is taught to select, if not `local`
            if capacities[step] == 1 and current is packing:
                local = torch.arange(hidden.shape[0], device=hidden.device)  # nothing to decide
            elif by_rank:
                local, current = self._select_topk(ranked, current, total, capacities[step])
            else:
                if learns and self.aux is not None:
                    target, _ = self._select_topk(logits, current, total, capacities[step])
                local, current = _select_above_threshold(ranked, current)
            target = local if target is None else target
            if counts:
                self.metrics.update(
                    step,
                    ranked if self.random else decides,
                    local,
                    rows,
                    packing.positions,
                    by_rank,
                )
            if self.aux == "loss":
                aux_losses.append(aux_loss(logits, target))
            elif aux_logits is not None:
                aux_losses.append(aux_loss(aux_logits, target))
            if self.use_z_loss:
                z_losses.append(z_loss(logits.unsqueeze(-1)))

            everything = current is before_selection
            x = candidates if everything else gather_tokens(candidates, local)
            gates = self.score(logits if everything else gather_tokens(logits, local))
            rows = rows if everything else gather_tokens(rows, local)
            y = block(x, current, step, rows)
            y, gate = apply_gate(self.gating, x, y, gates)
            before = hidden
            hidden = add_rows(step, hidden, y, rows, gate, keep_states)
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

    def _random_threshold(self, step: int) -> float:
        """Uniform scores above it are the share of the candidates that training takes."""
        candidates = self.capacities[step - 1] if step else 1.0
        return 1 - self.capacities[step] / candidates

    def _capacities_now(self, counts: bool) -> list[float]:
        """Capacities of a call that learns; a recomputation has those of the call it repeats."""
        if self.capacity_warmup_steps == 0:
            return self.capacities
        rest = _warmup_rest(int(self.warmup_step) - (not counts), self.capacity_warmup_steps)
        if counts:
            self.warmup_step += 1
        return [c + (1 - c) * rest for c in self.capacities]

    def _select_topk(
        self, logits: Tensor, packing: Packing, total: tuple[int, ...] | None, capacity: float
    ) -> tuple[Tensor, Packing]:
        """The k best candidates of every sequence; k counts from its full length."""
        assert total is not None, "expert-choice training needs sequence lengths on the host"
        have_rows = packing.lengths or tuple(packing.cu_seqlens.diff().tolist())
        # As the authors: int() of the float product, at least one token, never more than are there.
        wanted = [
            min(max(1, int(capacity * n)), have) for n, have in zip(total, have_rows, strict=True)
        ]
        if wanted == list(have_rows):
            return torch.arange(packing.num_rows, device=logits.device), packing
        scores = logits.detach()
        if len(set(wanted)) == 1:
            local = route_topk(scores, wanted[0], packing.cu_seqlens)
        else:
            k = torch.tensor(wanted, dtype=torch.int64).to(logits.device)
            local = route_topk(scores, k, packing.cu_seqlens, num_rows=sum(wanted))
        return local, packing.select(local, lengths=wanted)


def _warmup_rest(steps: int, warmup: int) -> float:
    """Share of a warm-up that is still to come, 1 to 0 by a half cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, steps / warmup)))


def _select_above_threshold(logits: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """Candidates whose logit is above 0, and their packing. One host synchronisation."""
    refuse_nan(logits, "ExpertChoice")
    grouped, offsets = group_rows(logits > 0, 2, packing.cu_seqlens)
    starts = offsets[packing.num_sequences :]
    (dropped,) = starts[:1].tolist()  # symbols under torch.compile and torch.export
    if not torch.compiler.is_compiling() and dropped == 0:
        return grouped, packing
    torch._check(dropped >= 0)
    torch._check(dropped <= packing.num_rows)
    local = grouped[dropped:]
    return local, packing.select(local, cu_seqlens=(starts - starts[0]).to(torch.int32))
