"""Draws seeds at random, again and again, and turns the spread of what follows into 95% intervals.

Of a rung's n seeds, a draw takes n - 1 with replacement, so that the variance of a mean over few seeds comes out right
(Rao and Wu, 1988); the budgets and arms of a seed stay together. Intervals are then widened by the ratio of Student's
to the normal quantile, as few seeds also leave their own spread uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def seed_weights(table: Array, draws: int, random: np.random.Generator) -> Array:
    """How often each draw takes each seed.

    Args:
        table: Values of a rung, [rows][seeds]; NaN where a seed has none.
        draws: Their number, before those are left out in which a row has no seed.

    Returns:
        Counts [draws][seeds].
    """
    seeds = table.shape[1]
    counts = random.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=draws).astype(np.float64)
    return counts[(counts @ ~np.isnan(table).T > 0).all(axis=1)]


def drawn_means(table: Array, counts: Array) -> Array:
    """Means [draws][rows] over the seeds that each draw takes."""
    return (counts @ np.nan_to_num(table).T) / (counts @ ~np.isnan(table).T)


def estimate(value: float, drawn: Array, freedom: float, level: float = LEVEL) -> Estimate:
    """The value with the interval that its draws give.

    Args:
        drawn: The value in each draw.
        freedom: Degrees of freedom of its spread.
        level: Probability that the interval is to hold the true value.
    """
    from scipy.stats import norm, t

    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    wider = float(t.ppf(1 - tail, freedom) / norm.ppf(1 - tail))
    return Estimate(value, value + wider * (float(low) - value), value + wider * (float(high) - value))


def welch_freedom(variances: Array, seeds: Array) -> float:
    """Degrees of freedom of a sum over rungs, by Welch and Satterthwaite: few where few seeds make most of the spread.

    Args:
        variances: Of what each rung adds.
        seeds: Of each rung.
    """
    total = float(variances.sum())
    return total**2 / float((variances**2 / (seeds - 1)).sum()) if total > 0 else float(seeds.sum())


def seeds_beyond_first(tables: Sequence[Array]) -> int:
    """Degrees of freedom of the spread of the seeds within rungs."""
    return sum(table.shape[1] - 1 for table in tables)
