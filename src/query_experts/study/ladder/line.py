"""Fits the gap of an arm against the logarithm of training compute as a straight line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from query_experts.study.ladder.bootstrap import (
    Array,
    Estimate,
    drawn_means,
    estimate,
    seed_weights,
    seeds_beyond_first,
)
from query_experts.study.ladder.gaps import Cell, Gap

DRAWS = 4000
MIN_RUNGS = 2  # two points of one rung differ in tokens alone


@dataclass(frozen=True)
class GapPoint:
    """The gap at one rung and budget, and the baseline's training FLOPs and tokens there."""

    rung: str
    budget: float
    flops: float
    tokens: int
    gap: Gap


@dataclass(frozen=True)
class GapLine:
    """gap = level + slope (log10 C - log10 centre), where C is the baseline's training compute in FLOPs.

    Args:
        points: What the line is fitted to: the gaps that have an interval.
        centre: Geometric mean of the points' FLOPs.
        level: The gap at the centre, nats a token.
        slope: Change of the gap with ten times the compute.
        drawn: Level and slope in each draw of seeds, [draws][2].
        freedom: Degrees of freedom of the seeds.
    """

    arm: str
    base: str
    points: list[GapPoint]
    centre: float
    level: float
    slope: Estimate
    drawn: Array
    freedom: int

    def at(self, flops: float) -> Estimate:
        """The gap at that compute."""
        terms = np.array([1.0, math.log10(flops / self.centre)])
        return estimate(self.level + self.slope.value * float(terms[1]), self.drawn @ terms, self.freedom)


def gap_points(cells: Sequence[Cell], arm: str, base: str) -> list[GapPoint]:
    """The gaps of an arm from a baseline, with or without an interval."""
    found = ((cell, cell.gap(arm, base)) for cell in cells)
    return [
        GapPoint(cell.rung, cell.budget, cell.arms[base].flops, cell.arms[base].train_tokens, gap)
        for cell, gap in found
        if gap is not None and gap.pairs
    ]


def fit_line(cells: Sequence[Cell], arm: str, base: str, draws: int = DRAWS) -> GapLine | None:
    """Weighted least squares over rungs and budgets, each weighing as many as its pairs.

    The intervals come from draws of the seeds within rungs.

    Returns:
        None with fewer than two rungs whose gaps have an interval.
    """
    points = [point for point in gap_points(cells, arm, base) if point.gap.has_interval]
    if len({point.rung for point in points}) < MIN_RUNGS:
        return None
    logs = np.log10([point.flops for point in points])
    solve = _least_squares(logs - logs.mean(), np.array([point.gap.pairs for point in points], dtype=np.float64))
    tables = _tables(points)
    level, slope = solve @ np.array([point.gap.difference.mean for point in points if point.gap.difference])
    drawn, freedom = _drawn_gaps(tables, draws) @ solve.T, seeds_beyond_first(tables)
    return GapLine(
        arm, base, points, float(10 ** logs.mean()), float(level), estimate(float(slope), drawn[:, 1], freedom), drawn,
        freedom,
    )  # fmt: skip


def _least_squares(x: Array, weights: Array) -> Array:
    """The matrix [2][points] that turns gaps into the level and slope of their line."""
    terms = np.stack([np.ones_like(x), x], axis=1)
    return np.linalg.solve(terms.T * weights @ terms, terms.T * weights)


def _tables(points: Sequence[GapPoint]) -> list[Array]:
    """The differences of each rung, [budgets][seeds]; NaN where a pair is missing. In the order of the points."""
    tables = []
    for rung in dict.fromkeys(point.rung for point in points):
        own = [point.gap.difference.differences for point in points if point.rung == rung and point.gap.difference]
        seeds = sorted({seed for differences in own for seed in differences})
        tables.append(np.array([[differences.get(seed, np.nan) for seed in seeds] for differences in own]))
    return tables


def _drawn_gaps(tables: Sequence[Array], draws: int) -> Array:
    random = np.random.default_rng(0)
    drawn = [drawn_means(table, seed_weights(table, draws, random)) for table in tables]
    kept = min(len(means) for means in drawn)
    return np.concatenate([means[:kept] for means in drawn], axis=1)
