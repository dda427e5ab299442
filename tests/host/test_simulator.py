"""The simulator: what pooling the exits gains where a pass costs the weights or the work.

Times are those of the serving design, section 3.6: up to 14 rows, a block pass costs 1, as reading
the weights does, and more rows cost in proportion; the ends cost the same by their own weights.
"""

import pytest

from mor.serving.simulator import simulate

RIDGE = 14
POLICIES = ("lock-step", 0.0, 0.25, 0.5, 0.75)


def curve(weights: float) -> list[tuple[float, float]]:
    return [(1, weights), (RIDGE, weights), (1000, weights * 1000 / RIDGE)]


def rate(policy: str | float, ends: float, depths: list[float], rows: int) -> float:
    """Tokens a second with that many sequences at once, of 64 tokens without a prompt."""
    found = simulate(
        [(0.0, 1, 64)] * (8 * rows), depths, num_blocks=50_000, num_recursions=len(depths) - 1,
        router="expert", max_rows=rows, policy=policy, block_seconds=curve(1.0),
        ends_seconds=curve(ends),
    )  # fmt: skip
    return found.tokens_per_second


UNIFORM_3, SHALLOW = [0, 1 / 3, 1 / 3, 1 / 3], [0, 0.8, 0.1, 0.1]
CELLS = {
    "135M uniform, 8 rows": (1.0, UNIFORM_3, 8, 1.0),
    "135M R = 4, 4 rows": (1.43, [0, *[0.25] * 4], 4, 1.0),
    "135M uniform, 32 rows": (1.0, UNIFORM_3, 32, 1.0),
    "V = 4k uniform, 8 rows": (0.27, UNIFORM_3, 8, 1.15),
    "135M shallow, 16 rows": (1.0, SHALLOW, 16, 1.25),
    "V = 4k shallow, 16 rows": (0.27, SHALLOW, 16, 1.5),
}


@pytest.mark.parametrize("cell", CELLS)
def test_auto_is_as_good_as_the_best_fixed_policy(cell: str) -> None:
    ends, depths, rows, gain = CELLS[cell]
    fixed = {policy: rate(policy, ends, depths, rows) for policy in POLICIES}
    auto = rate("auto", ends, depths, rows)
    assert auto >= 0.97 * max(fixed.values()), fixed
    assert auto >= gain * fixed["lock-step"], fixed


def test_where_work_is_all_pooling_changes_nothing() -> None:
    """Times that are proportional to the rows: each row costs the same in any company."""
    proportional = [(1, 1.0), (64, 64.0)]
    seconds = {
        policy: simulate(
            [(0.0, 1, 32)] * 16, UNIFORM_3, num_blocks=5000, num_recursions=3, router="expert",
            max_rows=16, policy=policy, block_seconds=proportional, ends_seconds=proportional,
        ).seconds
        for policy in ("lock-step", 0.0, "auto")
    }  # fmt: skip
    assert max(seconds.values()) <= 1.02 * min(seconds.values()), seconds


def test_latencies_and_arrivals() -> None:
    flat = [(1, 1.0), (64, 1.0)]
    found = simulate(
        [(0.0, 5, 3), (100.0, 5, 3)], [0, 1, 0], num_blocks=100, num_recursions=2, router="token",
        policy="lock-step", block_seconds=flat, ends_seconds=flat,
    )  # fmt: skip
    # enter (1), block (1), exit (1); then the enter pass is part of the ends.
    assert found.first_token == (3.0, 3.0)
    assert found.inter_token == (2.0, 2.0)
    assert (found.seconds, found.stats.sampled_tokens) == (107.0, 6)


def test_a_histogram_of_other_depths_is_refused() -> None:
    with pytest.raises(ValueError, match="depths: expected the shares of depths 0 to 3, got 3"):
        simulate([], [0, 0.5, 0.5], num_blocks=1, num_recursions=3, policy=1.0)
