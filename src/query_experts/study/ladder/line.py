"""Fits the gap of an arm against the logarithm of training compute as a straight line.

The line goes through one point a rung, at all of its tokens: fewer tokens at the same size are another question, and
they share a rung's seeds. Besides the noise of seeds a rung has a scatter of its own, as its shape, rate and batch suit
an arm more or less. So the line is a meta-regression: the variance of a point is that of its seeds plus one that all
rungs share, which Paule and Mandel's rule sets to what the points' distances from the line require (J. Res. NBS 87,
1982). Intervals are Student's t on rungs - 2 (Knapp and Hartung, Statist. Med. 22, 2003).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from query_experts.study.ladder.estimates import Array, Estimate, estimate
from query_experts.study.ladder.gaps import Cell, Gap

MIN_RUNGS = 3  # two points leave no distance from their line
BISECTIONS = 60
LEAST_VARIANCE = 1e-16  # of seeds, squared nats a token


@dataclass(frozen=True)
class GapPoint:
    """The gap at one rung and budget, and the training compute and tokens there."""

    rung: str
    budget: float
    compute: float
    tokens: int
    gap: Gap


@dataclass(frozen=True)
class GapLine:
    """gap = level + slope (log10 C - log10 centre), where C = 6 N D is the training compute in FLOPs.

    Args:
        points: What the line is fitted to: the gaps at all tokens that have an interval, one a rung.
        centre: Geometric mean of the points' compute.
        level: The gap at the centre, nats a token.
        slope: The change of the gap with ten times the compute.
        covariance: Of level and slope, [2][2].
        scatter: Variance of a rung's own distance from the line, beyond that of its seeds.
    """

    arm: str
    base: str
    points: list[GapPoint]
    centre: float
    level: float
    slope: float
    covariance: Array
    scatter: float

    def at(self, compute: float) -> Estimate:
        """The line at that compute."""
        return self._estimate(1.0, math.log10(compute / self.centre))

    def of_rung(self, compute: float) -> Estimate:
        """The gap of a rung with that compute, whose own scatter adds to the line's interval."""
        return self._estimate(1.0, math.log10(compute / self.centre), self.scatter)

    @property
    def trend(self) -> Estimate:
        """The slope with its interval."""
        return self._estimate(0.0, 1.0)

    def _estimate(self, of_level: float, of_slope: float, more: float = 0.0) -> Estimate:
        terms = np.array([of_level, of_slope])
        variance = float(terms @ self.covariance @ terms) + more
        return estimate(of_level * self.level + of_slope * self.slope, variance, len(self.points) - 2)


def gap_points(cells: Sequence[Cell], arm: str, base: str) -> list[GapPoint]:
    """The gaps of an arm from a baseline, with or without an interval."""
    found = ((cell, cell.gap(arm, base)) for cell in cells)
    return [
        GapPoint(cell.rung, cell.budget, cell.compute(base), cell.arms[base].train_tokens, gap)
        for cell, gap in found
        if gap is not None and gap.pairs
    ]


def fit_line(cells: Sequence[Cell], arm: str, base: str) -> GapLine | None:
    """The line through the gaps of rungs at all of their tokens.

    Returns:
        None with fewer than three rungs whose gaps there have an interval, or all of one size.
    """
    points = [point for point in gap_points(cells, arm, base) if point.budget == 1 and point.gap.has_interval]
    logs = np.log10([point.compute for point in points])
    if len(points) < MIN_RUNGS or np.ptp(logs) == 0:
        return None
    terms = np.stack([np.ones_like(logs), logs - logs.mean()], axis=1)
    gaps = [point.gap.difference for point in points if point.gap.difference]
    means, seeds = np.array([gap.mean for gap in gaps]), _variances([[*gap.differences.values()] for gap in gaps])
    scatter = _scatter(terms, means, seeds)
    (level, slope), covariance = _least_squares(terms, means, seeds + scatter)
    return GapLine(arm, base, points, float(10 ** logs.mean()), float(level), float(slope), covariance, scatter)


def _variances(differences: Sequence[Sequence[float]]) -> Array:
    """Of each rung's mean over seeds, from the spread of seeds that all rungs share: few seeds don't tell their own.

    Seeds that all give one difference leave a little, so that every point has a finite weight.
    """
    beyond = sum(len(own) - 1 for own in differences)
    spread = sum((len(own) - 1) * np.var(own, ddof=1) for own in differences) / beyond
    return max(float(spread), LEAST_VARIANCE) / np.array([len(own) for own in differences])


def _least_squares(terms: Array, means: Array, variances: Array) -> tuple[Array, Array]:
    """Level and slope by weighted least squares, and their covariance."""
    covariance = np.linalg.inv(terms.T / variances @ terms)
    return covariance @ (terms.T / variances @ means), covariance


def _scatter(terms: Array, means: Array, seeds: Array) -> float:
    """The variance to add to that of the seeds so that the squared distances add up to rungs - 2; 0 if they do less."""

    def too_far(scatter: float) -> bool:
        missed = means - terms @ _least_squares(terms, means, seeds + scatter)[0]
        return float(np.sum(missed**2 / (seeds + scatter))) > len(means) - 2

    if not too_far(0.0):
        return 0.0
    low, high = 0.0, float(np.ptp(means)) ** 2 * len(means)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_far(middle) else (low, middle)
    return high
