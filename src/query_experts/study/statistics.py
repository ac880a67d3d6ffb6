"""Computes the paired difference of two arms over seeds, with its 95% interval.

Seeds of one arm differ by as much as arms do, so runs are compared seed by seed: both arms of a pair start from
the same values and see the same tokens. An interval needs three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_SEEDS_FOR_INTERVAL = 3
SLOWED = 1.3  # repeats on an idle machine lie within 1.05 of each other
EQUAL_BELOW = 5e-5  # smaller differences round to zero at the four digits that are shown


@dataclass(frozen=True)
class PairedDifference:
    """The differences of two arms, seed by seed.

    Args:
        differences: First minus second, by seed.
        mean: Over the seeds.
        low: Lower end of the 95% interval of the mean; None below three seeds.
        high: Upper end.
    """

    differences: dict[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def same_sign(self) -> bool:
        """Whether the difference has the same sign on every seed, none of them zero."""
        return {sign(value) for value in self.differences.values()} in ({-1}, {1})

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero lies outside it."""
        return self.low is not None and self.high is not None and (sign(self.low) > 0 or sign(self.high) < 0)


def sign(difference: float) -> int:
    """-1, 0 or 1; 0 for a difference that rounds to zero at four digits."""
    return 0 if abs(difference) < EQUAL_BELOW else 1 if difference > 0 else -1


def disturbed(seconds: Sequence[float]) -> bool:
    """Whether other work disturbed the timing: a repeat took over SLOWED times as long as the fastest."""
    return max(seconds) > SLOWED * min(seconds)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
    """Differences a - b over the seeds of both, with Student's 95% interval from three seeds on.

    Args:
        a: Value by seed; None or not finite for a run that diverged, whose seed is left out.
        b: The same of the other arm.

    Returns:
        None if no seed remains.
    """
    left, right = _finite(a), _finite(b)
    differences = {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}
    if not differences:
        return None
    values = list(differences.values())
    mean = statistics.fmean(values)
    if len(values) < MIN_SEEDS_FOR_INTERVAL:
        return PairedDifference(differences, mean, None, None)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return PairedDifference(differences, mean, mean - half, mean + half)


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: float(value) for seed, value in values.items() if value is not None and math.isfinite(value)}
