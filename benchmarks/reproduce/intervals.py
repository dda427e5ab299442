"""Means over seeds with their confidence intervals, and the verdict on a claim."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["FEWEST_SEEDS", "Interval", "interval", "verdict"]

#: A difference is claimed of no fewer seeds.
FEWEST_SEEDS = 3

#: 97.5% quantiles of Student's t, by degrees of freedom; the normal quantile beyond the table.
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    freedom = len(values) - 1
    quantile = _T[freedom] if freedom < len(_T) else 1.96
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def verdict(lower: Sequence[float], higher: Sequence[float]) -> str:
    """What the seeds say of the claim that `lower` is lower.

    The differences are taken seed by seed: two variants of a seed saw the same rows in one order.

    Returns:
        "reproduced" or "contradicted" where the interval of the difference excludes zero, "not at
        this size" where it does not, "too few seeds" below `FEWEST_SEEDS`.
    """
    if len(lower) < FEWEST_SEEDS:
        return "too few seeds"
    difference = interval([a - b for a, b in zip(lower, higher, strict=True)])
    if abs(difference.mean) <= difference.half_width:
        return "not at this size"
    return "reproduced" if difference.mean < 0 else "contradicted"
