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
    welch_freedom,
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
        slope: The change of the gap with ten times the compute.
        drawn: What each rung adds to level and slope in each draw of seeds, [draws][rungs][2].
        seeds: Number of seeds of each rung.
    """

    arm: str
    base: str
    points: list[GapPoint]
    centre: float
    level: float
    slope: float
    drawn: Array
    seeds: Array

    def at(self, flops: float) -> Estimate:
        """The gap at that compute."""
        return self._estimate(1.0, math.log10(flops / self.centre))

    @property
    def trend(self) -> Estimate:
        """The slope with its interval."""
        return self._estimate(0.0, 1.0)

    def _estimate(self, of_level: float, of_slope: float) -> Estimate:
        by_rung = self.drawn @ np.array([of_level, of_slope])
        freedom = welch_freedom(by_rung.var(axis=0), self.seeds)
        return estimate(of_level * self.level + of_slope * self.slope, by_rung.sum(axis=1), freedom)


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
    seeds = np.array([table.shape[1] for table in tables])
    centre = float(10 ** logs.mean())
    return GapLine(arm, base, points, centre, float(level), float(slope), _drawn(tables, solve, draws), seeds)


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


def _drawn(tables: Sequence[Array], solve: Array, draws: int) -> Array:
    """What each rung adds to level and slope in each draw."""
    random = np.random.default_rng(0)
    parts = np.split(solve, np.cumsum([len(table) for table in tables])[:-1], axis=1)
    drawn = [
        drawn_means(table, seed_weights(table, draws, random)) @ part.T
        for table, part in zip(tables, parts, strict=True)
    ]
    kept = min(map(len, drawn))
    return np.stack([each[:kept] for each in drawn], axis=1)
