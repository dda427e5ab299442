"""What an engine would do, from the seconds of its passes and a histogram of depths alone.

The scheduler is the engine's own; a random depth for each row and the curves of
`Engine.curves` stand for the model. So throughput and latency of a policy, a batch or a machine
can be predicted before it is bought.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from mor._host import Scheduler

__all__ = ["Simulation", "simulate"]

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Simulation:
    """Predicted figures of a run in which a finished request is replaced at once.

    Attributes:
        tokens_per_second: sampled tokens over all seconds.
        inter_token_p50, inter_token_p99: seconds between tokens of a request.
        first_token_p50, first_token_p99: seconds from arrival to the first token.
        mean_block_rows: rows of a block pass.
    """

    tokens_per_second: float
    inter_token_p50: float
    inter_token_p99: float
    first_token_p50: float
    first_token_p99: float
    mean_block_rows: float


def simulate(
    block_seconds: Curve,
    ends_seconds: Curve,
    depths: Sequence[float],
    *,
    batch_size: int,
    num_requests: int = 256,
    prompt_tokens: int = 1,
    new_tokens: int = 64,
    policy: str | float = "auto",
    chunk: int = 128,
    router: str = "expert",
    seed: int = 0,
) -> Simulation:
    """Predict how an engine serves requests of one size.

    Args:
        block_seconds: (rows, seconds) of a block pass, as `Engine.curves["block"]`.
        ends_seconds: the same of an exit and an enter pass, `Engine.curves["ends"]`.
        depths: share of the tokens that exit after recursion 1, 2, ..., R.
        batch_size: requests that run at once.
        num_requests: requests in all; the next one arrives when one ends.
        prompt_tokens: of each request.
        new_tokens: of each request.
        policy: see `Engine`.
        chunk: see `Engine`.
        router: "expert" or "token".
        seed: of the depths.

    Raises:
        ValueError: depths that are no shares, or an option that the scheduler refuses.

    Example:
        >>> flat = [(1, 0.01), (64, 0.01)]
        >>> run = simulate(flat, flat, [0.5, 0.5], batch_size=1, num_requests=8)
        >>> 0.02 < 1 / run.tokens_per_second < 0.03
        True
    """
    if not depths or min(depths) < 0 or not 0.999 < sum(depths) < 1.001:
        raise ValueError(
            f"depths: expected shares of recursions 1 .. R that sum to 1, got {list(depths)}"
        )
    length = prompt_tokens + new_tokens
    scheduler = Scheduler(
        num_blocks=(len(depths) + 1) * (length // 16 + 2) * (batch_size + 1),
        ends_block_tokens=16,
        num_recursions=len(depths),
        router=router,  # type: ignore[arg-type]
        max_rows=batch_size,
        chunk=chunk,
        policy=policy,  # type: ignore[arg-type]
        block_seconds=block_seconds,
        ends_seconds=ends_seconds,
        prefix_cache=False,
    )
    draw, cumulative = random.Random(seed), list(accumulate(depths))
    depth_of = np.zeros(batch_size + chunk, np.int64)
    now, arrived, last = 0.0, dict[int, float](), dict[int, float]()
    gaps: list[float] = []
    firsts: list[float] = []
    tokens = started = 0

    def arrive() -> None:
        nonlocal started
        if started < num_requests:
            started += 1
            id = scheduler.add([0] * prompt_tokens, max_tokens=new_tokens, now=now)
            arrived[id] = now

    for _ in range(batch_size):
        arrive()
    while scheduler.has_work:
        plan = scheduler.plan(now)
        now += plan.expected_seconds
        if plan.kind == "enter":
            drawn = draw.choices(range(1, len(depths) + 1), cum_weights=cumulative, k=plan.num_rows)
            depth_of[plan.slots] = drawn
            by_token = np.asarray(drawn, np.uint8)
            scheduler.report(by_token if router == "token" else np.ones_like(by_token))
        elif plan.kind == "block":
            keep = (depth_of[plan.slots] > plan.recursions).astype(np.uint8)
            scheduler.report(keep if router == "expert" else None)
        else:
            for id in plan.sample_ids.tolist():
                tokens += 1
                if id in last:
                    gaps.append(now - last[id])
                else:
                    firsts.append(now - arrived[id])
                last[id] = now
            scheduler.report(None, np.zeros(len(plan.sample_ids), np.int64))
        for _ in scheduler.take_finished():
            arrive()
    stats = scheduler.stats()
    return Simulation(
        tokens / now,
        *_quantiles(gaps),
        *_quantiles(firsts),
        stats.block_rows / max(stats.block_passes, 1),
    )


def _quantiles(values: list[Any]) -> tuple[float, float]:
    return (
        float(np.quantile(values, 0.5)) if values else 0.0,
        float(np.quantile(values, 0.99)) if values else 0.0,
    )
