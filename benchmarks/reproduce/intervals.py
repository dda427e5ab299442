"""Means over seeds with their confidence intervals, and the verdict on a claim."""

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

__all__ = ["FEWEST_SEEDS", "VERDICTS", "Interval", "interval", "verdict"]

#: A difference is claimed of no fewer seeds.
FEWEST_SEEDS = 3

VERDICTS = ("reproduced", "contradicted", "not at this size", "too few seeds")


class Interval(NamedTuple):
    """A mean and half the width of its 95% confidence interval (NaN for a single value)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        """Mean, and the half width where there is one."""
        if math.isnan(self.half_width):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.half_width:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """The 95% confidence interval of a mean, by Student's t.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("interval: expected at least one value, got none")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan)
    quantile = _quantile(len(values) - 1)
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def verdict(differences: Sequence[float]) -> str:
    """What the seeds say of a claim.

    Args:
        differences: of each seed, negative where the claim holds. Two variants of a seed saw the
            same rows in one order.

    Returns:
        one of `VERDICTS`: the first or second where the interval of the difference excludes zero,
        the third where it does not, the last below `FEWEST_SEEDS`.
    """
    reproduced, contradicted, unclear, too_few = VERDICTS
    if len(differences) < FEWEST_SEEDS:
        return too_few
    difference = interval(differences)
    if abs(difference.mean) <= difference.half_width:
        return unclear
    return reproduced if difference.mean < 0 else contradicted


def _inside(t: float, freedom: int) -> float:
    """Probability that Student's t lies in [-t, t].

    The finite sums for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


@cache
def _quantile(freedom: int) -> float:
    """The t with 95% of the distribution inside [-t, t], by bisection."""
    low, high = 0.0, 16.0  # 12.7 with one degree of freedom, less with more
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _inside(middle, freedom) < 0.95 else (low, middle)
    return middle
