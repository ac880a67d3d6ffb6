"""Draws the seeds of rungs at random, again and again.

Of a rung's n seeds, a draw takes n - 1 with replacement, so that the variance of a mean over few seeds comes out right
(Rao and Wu, J. Am. Stat. Assoc. 83, 1988). The budgets and arms of a seed stay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from query_experts.study.ladder.estimates import Array


def seed_table(rows: Sequence[Mapping[int, float]]) -> Array:
    """The losses of a rung, [rows][seeds]; NaN where a row lacks a seed.

    Args:
        rows: Losses by seed, a row for each arm and budget.
    """
    seeds = sorted({seed for row in rows for seed in row})
    return np.array([[row.get(seed, np.nan) for seed in seeds] for row in rows])


def drawn_means(table: Array, draws: int, random: np.random.Generator) -> Array:
    """Means over the seeds that each draw takes, [draws][rows]; a draw that leaves a row without a seed is repeated."""
    present, seeds = ~np.isnan(table), table.shape[1]
    found = np.empty((0, seeds))
    while len(found) < draws:
        counts = random.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=draws)
        found = np.concatenate([found, counts[(counts @ present.T > 0).all(axis=1)]])
    taken = found[:draws]
    return (taken @ np.nan_to_num(table).T) / (taken @ present.T)
