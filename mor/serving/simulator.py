"""Throughput and latency of serving, predicted from a histogram of depths and two measured curves.

The engine's own scheduler makes every decision; what it would wait for is taken from the curves.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor import _host

__all__ = ["Prediction", "simulate"]


@dataclass(frozen=True)
class Prediction:
    """Prediction of `simulate`; times are in seconds.

    Attributes:
        seconds: from the first arrival to the last token.
        tokens_per_second: tokens sampled in that time.
        first_token: median and 99th percentile of the time from arrival to the first token.
        inter_token: the same of the time between two tokens of a sequence.
        peak_blocks: most blocks of keys and values that were in use at once.
        stats: of the scheduler at the end.
    """

    seconds: float
    tokens_per_second: float
    first_token: tuple[float, float]
    inter_token: tuple[float, float]
    peak_blocks: int
    stats: _host.Stats


def simulate(
    requests: Iterable[tuple[float, int, int]],
    depths: Sequence[float],
    *,
    seed: int = 0,
    pass_seconds: Callable[[_host.Plan], float] | None = None,
    **options: Any,
) -> Prediction:
    """Serves requests without a model.

    Args:
        requests: arrival, prompt tokens and tokens to generate of each.
        depths: share of the rows that take 0 .. R recursions; the sum is 1.
        seed: of the draws from it.
        pass_seconds: how long a pass takes; by default what the two curves say, which are those of
            rows without context.
        options: of `mor._host.Scheduler`, both curves among them; no prefix is cached.

    Returns:
        The prediction.

    Raises:
        ValueError: a wrong option, or a histogram that does not fit num_recursions.
    """
    recursions = options.get("num_recursions", 1)
    if len(depths) != recursions + 1:
        raise ValueError(
            f"depths: expected the shares of depths 0 to {recursions}, got {len(depths)} numbers"
        )
    scheduler = _host.Scheduler(**options | {"prefix_cache": False})
    router = options.get("router", "none")
    rng = np.random.default_rng(seed)
    depth_of = np.zeros(scheduler.num_slots, dtype=np.uint8)
    arrivals = sorted(requests)
    waiting = iter(arrivals)
    upcoming = next(waiting, None)
    now = start = upcoming[0] if upcoming else 0.0
    last_token: dict[int, float] = {}
    first_gaps: list[float] = []
    gaps: list[float] = []
    arrived: dict[int, float] = {}
    peak_blocks = 0
    while upcoming or scheduler.has_work:
        if not scheduler.has_work and upcoming:
            now = max(now, upcoming[0])
        while upcoming and upcoming[0] <= now:
            arrival, prompt, tokens = upcoming
            id = scheduler.add(np.zeros(prompt, dtype=np.int64), max_tokens=tokens, now=now)
            arrived[id] = arrival
            upcoming = next(waiting, None)
        plan = scheduler.plan(now)
        now += plan.expected_seconds if pass_seconds is None else pass_seconds(plan)
        stats = scheduler.stats()
        peak_blocks = max(peak_blocks, stats.blocks - stats.blocks_free)
        if plan.kind == "exit":
            scheduler.report(tokens=np.zeros_like(plan.sample_ids))
            for id in plan.sample_ids.tolist():
                if id in last_token:
                    gaps.append(now - last_token[id])
                else:
                    first_gaps.append(now - arrived[id])
                last_token[id] = now
        elif router == "none":
            scheduler.report()
        elif plan.kind == "enter":
            drawn = rng.choice(recursions + 1, plan.num_rows, p=depths).astype(np.uint8)
            depth_of[plan.slots] = drawn
            scheduler.report(drawn if router == "token" else drawn > 0)
        else:
            keep = depth_of[plan.slots] > plan.recursions
            scheduler.report(keep if router == "expert" else None)
    stats = scheduler.stats()
    seconds = now - start
    return Prediction(
        seconds=seconds,
        tokens_per_second=stats.sampled_tokens / seconds if seconds else 0.0,
        first_token=_median_and_p99(first_gaps),
        inter_token=_median_and_p99(gaps),
        peak_blocks=peak_blocks,
        stats=stats,
    )


def _median_and_p99(seconds: list[float]) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    return float(np.percentile(seconds, 50)), float(np.percentile(seconds, 99))
