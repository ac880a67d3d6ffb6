"""A value with its 95% interval, from a variance over rungs by Student's t, or from draws of seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from query_experts.study.ladder.gaps import Known, what_is_known

LEVEL = 0.95
Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; None without one."""

    value: float
    low: float | None
    high: float | None

    @property
    def known(self) -> Known:
        return what_is_known(self.low, self.high)

    @property
    def half_width(self) -> float:
        """Half of the interval; 0 without one."""
        return (self.high - self.low) / 2 if self.low is not None and self.high is not None else 0.0


def estimate(value: float, variance: float, freedom: float, level: float = LEVEL) -> Estimate:
    """The value with its interval.

    Args:
        variance: Of the value.
        freedom: Degrees of freedom of the variance.
        level: Probability that the interval is to hold the true value.
    """
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


def jackknife(value: float, left_out: Array, level: float = LEVEL, more: float = 0.0) -> Estimate:
    """The value with the interval that leaving out one rung at a time gives: Student's t on rungs - 1.

    Rungs are independent, so this holds all that moves them: seeds, and what belongs to a size alone.

    Args:
        left_out: The value without each rung.
        more: A variance to add.
    """
    rungs = len(left_out)
    variance = (rungs - 1) / rungs * float(np.sum((left_out - left_out.mean()) ** 2))
    return estimate(value, variance + more, rungs - 1, level)


def bootstrap(value: float, drawn: Array, freedom: int) -> Estimate:
    """The value with the interval between the quantiles of its draws.

    The interval is widened by the ratio of Student's to the normal quantile, as few seeds leave their own spread
    uncertain.

    Args:
        drawn: The value in each draw.
        freedom: Degrees of freedom of the seeds.
    """
    from scipy.stats import norm, t

    tail = (1 - LEVEL) / 2
    low, high = map(float, np.quantile(drawn, [tail, 1 - tail]))
    wider = float(t.ppf(1 - tail, freedom) / norm.ppf(1 - tail))
    return Estimate(value, value + wider * (low - value), value + wider * (high - value))
