"""What the scheduler costs: planning and reporting passes of decoding sequences, without a model.

`plan` is one call of plan with all its arrays fetched, `report` one call of report; both are
medians over the block, exit and enter passes of decoding. The aim is less than 50 us for both
together at 32 rows.
"""

import statistics
import time
from typing import Any

import numpy as np
from harness import parse_args

from mor import _host

CURVE = [(1, 1e-3), (16, 1e-3), (64, 4e-3)]
ARRAYS = {
    "enter": ("slots", "tokens", "positions", "slot_mapping", "cu_seqlens", "block_table",
              "context_lens", "thresholds"),
    "block": ("slots", "recursions", "positions", "slot_mapping", "cu_seqlens", "block_table",
              "context_lens", "thresholds", "recursion_offsets"),
    "exit": ("slots", "positions", "slot_mapping", "cu_seqlens", "block_table", "context_lens",
             "sample_rows", "sample_ids"),
}  # fmt: skip


def microseconds(rows: int, steps: int, **options: Any) -> tuple[float, float, float]:
    """Medians of plan and of report, mean rows a pass, at a context of about 512 tokens."""
    scheduler = _host.Scheduler(
        num_blocks=200_000, num_recursions=3, ends_block_tokens=64, router="expert",
        max_rows=rows, chunk=512, block_seconds=CURVE, ends_seconds=CURVE, **options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(rows):
        scheduler.add(rng.integers(0, 50_000, 512), max_tokens=10_000, now=0.0)
    planning, reporting, counted_rows = [], [], 0
    while len(planning) < steps:
        start = time.perf_counter()
        plan = scheduler.plan(0.0)
        for name in ARRAYS[plan.kind]:
            getattr(plan, name)
        planned = time.perf_counter()
        if plan.kind == "exit":
            tokens = rng.integers(0, 50_000, len(plan.sample_ids))
            results = (np.zeros(len(tokens), dtype=np.uint8), tokens)
        else:
            # Uniform depths 1 .. 3.
            share = 1.0 if plan.kind == "enter" else 0.6
            results = ((rng.random(plan.num_rows) < share).astype(np.uint8), None)
        called = time.perf_counter()
        scheduler.report(*results)
        reported = time.perf_counter()
        if scheduler.stats().sampled_tokens > 4 * rows:  # the prompts are in
            planning.append(planned - start)
            reporting.append(reported - called)
            counted_rows += plan.num_rows
    medians = [statistics.median(seconds) * 1e6 for seconds in (planning, reporting)]
    return medians[0], medians[1], counted_rows / steps


if __name__ == "__main__":
    args = parse_args(__doc__)
    steps = 50 if args.smoke else 4000
    print(
        f"{'policy':>10} {'sequences':>9} {'rows/pass':>9} {'plan us':>8} {'report us':>9} sum us"
    )
    for policy in ("lock-step", "auto"):
        for rows in (1, 8, 32, 64):
            plan, report, mean = microseconds(rows, steps, policy=policy)
            print(
                f"{policy:>10} {rows:9} {mean:9.1f} {plan:8.1f} {report:9.1f} {plan + report:6.1f}"
            )
