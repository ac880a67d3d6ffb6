"""Owns the study's one statistical claim: the paired difference of two arms over seeds, with its 95% interval.

Seeds of one arm differ by as much as arms do, so runs are compared seed by seed: both arms of a pair start from
the same values and see the same tokens. Below three seeds there is no interval, only the differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_SEEDS_FOR_INTERVAL = 3

# 97.5% quantile of Student's t for 1 to 30 degrees of freedom (tests integrate the density to check each entry).
_T_975 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip
_Z_975 = 1.959964


@dataclass(frozen=True)
class PairedDifference:
    """First minus second, seed by seed. `low` and `high` bound the mean at 95%, or are None below three seeds."""

    differences: dict[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def same_sign(self) -> bool:
        """Whether every seed points the same way."""
        values = self.differences.values()
        return all(value < 0 for value in values) or all(value > 0 for value in values)

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_quantile_975(degrees_of_freedom: int) -> float:
    """The 97.5% quantile of Student's t: a table up to 30, beyond it the normal one with Fisher's correction."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom is {degrees_of_freedom}, but must be at least 1")
    if degrees_of_freedom <= len(_T_975):
        return _T_975[degrees_of_freedom - 1]
    z, n = _Z_975, degrees_of_freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def paired_difference(
    a: Mapping[int, float] | Sequence[float], b: Mapping[int, float] | Sequence[float]
) -> PairedDifference | None:
    """Differences a - b over the seeds that both have, their mean and (from three on) a t-based 95% interval.

    `a` and `b` map seed to value; a sequence counts as seeds 0, 1, ... A seed that either side lacks, or whose value
    is None or not finite, is left out. None if no seed remains.
    """
    left, right = _by_seed(a), _by_seed(b)
    differences = {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}
    if not differences:
        return None
    count = len(differences)
    mean = math.fsum(differences.values()) / count
    if count < MIN_SEEDS_FOR_INTERVAL:
        return PairedDifference(differences, mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in differences.values()) / (count - 1)
    half = t_quantile_975(count - 1) * math.sqrt(variance / count)
    return PairedDifference(differences, mean, mean - half, mean + half)


def _by_seed(values: Mapping[int, float] | Sequence[float]) -> dict[int, float]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {seed: float(value) for seed, value in pairs if value is not None and math.isfinite(value)}
