"""Fits a scaling law L(N, D) = E + A N^-alpha + B D^-beta to the mean losses of all arms, rungs and budgets.

N counts parameters and D training tokens, as in Hoffmann et al. (arXiv 2203.15556). As there, and as corrected by
Besiroglu et al. (arXiv 2404.10102), the fit minimises the Huber loss of the residuals of log L, from several starts.

E, alpha and beta are shared by the arms; A and B are each arm's own. E stays shared because it belongs to the text.
The exponents become each arm's own only if the data say so: both laws are fitted to the same bootstrap draws, and the
interval of an arm's alpha or beta minus the first arm's has to exclude zero, at a level that allows for the number of
such differences (Bonferroni).

A bootstrap draw takes rungs with replacement, three different ones or more, and within each its seeds. With three
rungs there is only one such choice, and the intervals hold the spread of the seeds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from query_experts.study.ladder.bootstrap import (
    LEVEL,
    Array,
    Estimate,
    drawn_means,
    estimate,
    seed_weights,
    seeds_beyond_first,
)
from query_experts.study.ladder.gaps import ArmCell, Cell
from query_experts.study.ladder.solver import Coefficients, Data, namer, residuals, solve, starts

Count = Literal["all", "without embeddings"]
MIN_RUNGS = 3
MIN_EXPLAINED = 0.5  # share of the variance of log L between cells, adjusted for the number of coefficients
DRAWS = 300


def size_of(cell: ArmCell, count: Count) -> int:
    """N of an arm.

    All parameters, tied ones once, are the default: a budget is 20 tokens a parameter of that count, and with small
    models a count without embeddings bends the law (Pearce and Song, arXiv 2406.12907).
    """
    return cell.parameters - (cell.embedding_parameters if count == "without embeddings" else 0)


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Args:
        count: What N counts.
        shared: Whether the arms share alpha and beta.
        best: The coefficients.
        drawn: The coefficients in each bootstrap draw.
        freedom: Degrees of freedom of the seeds.
        rungs: Number of rungs that it is fitted to.
        cells: Number of mean losses that it is fitted to.
        error: Root mean square of the residuals of log L.
        explained: Share of the variance of log L that it explains, adjusted for the number of coefficients.
    """

    count: Count
    shared: bool
    best: Coefficients
    drawn: list[Coefficients]
    freedom: int
    rungs: int
    cells: int
    error: float
    explained: float

    @property
    def arms(self) -> list[str]:
        return list(self.best.A)

    def estimate(self, value: Callable[[Coefficients], float]) -> Estimate:
        """A function of the coefficients, with its interval."""
        drawn = np.array([value(coefficients) for coefficients in self.drawn])
        return estimate(value(self.best), drawn, self.freedom)


@dataclass(frozen=True)
class NoLaw:
    """Why there is no law: a sentence."""

    why: str


@dataclass(frozen=True)
class _Rung:
    """One rung's losses [rows][seeds], NaN where a run is missing, and the rows of the data that they belong to."""

    losses: Array
    rows: Array


def fit_law(cells: Sequence[Cell], count: Count, draws: int = DRAWS) -> Law | NoLaw:
    """Fits the law to the cells that have three seeds or more, of the arms that have such cells on three rungs.

    Args:
        draws: Number of bootstrap draws.
    """
    used = _used(cells)
    rungs = list(dict.fromkeys(cell.rung for cell, _ in used))
    if len(rungs) < MIN_RUNGS:
        return NoLaw(f"A law needs three rungs where an arm has three seeds; there are {len(rungs)}.")
    if len({cell.budget for cell, _ in used}) < 2:
        return NoLaw("A law needs two budgets: with one, tokens grow as parameters do, and their terms can't be told "
                     "apart.")  # fmt: skip
    data, origin = _data(used, count)
    if len(data.log_loss) <= 3 + 2 * len(data.arms):
        return NoLaw(
            f"A law of {3 + 2 * len(data.arms)} coefficients needs more than {len(data.log_loss)} mean losses."
        )
    tables = [_rung(used, rung) for rung in rungs]
    freedom = seeds_beyond_first([table.losses for table in tables])
    samples = _samples(data, tables, draws)
    if not _falls(data, samples, freedom):
        return NoLaw("The loss doesn't fall with size and tokens by more than seeds explain, so there is no law.")
    best, drawn, shared = _fit_both(data, samples, freedom)
    error, explained = _quality(data, best)
    if explained < MIN_EXPLAINED:
        share = f"{max(0, explained):.0%}"
        return NoLaw(f"A law would explain {share} of the variance between rungs and budgets, too little to be one.")
    name = namer(data.arms, origin)
    return Law(count, shared, name(best), [name(theta) for theta in drawn], freedom, len(rungs), len(data.log_loss),
               error, explained)  # fmt: skip


def _used(cells: Sequence[Cell]) -> list[tuple[Cell, ArmCell]]:
    counting = [(cell, own) for cell in cells for own in cell.arms.values() if own.counts]
    rungs: dict[str, set[str]] = {}
    for cell, own in counting:
        rungs.setdefault(own.arm, set()).add(cell.rung)
    return [(cell, own) for cell, own in counting if len(rungs[own.arm]) >= MIN_RUNGS]


def _data(used: Sequence[tuple[Cell, ArmCell]], count: Count) -> tuple[Data, Array]:
    """The data, and the natural logarithms of the size and tokens that theirs are relative to."""
    arms = list(dict.fromkeys(own.arm for _, own in used))
    logs = np.log([[size_of(own, count), own.train_tokens] for _, own in used])
    origin = logs.mean(axis=0)
    log_loss = np.log([own.mean for _, own in used if own.mean is not None])
    positions = np.array([arms.index(own.arm) for _, own in used])
    return Data(arms, positions, logs[:, 0] - origin[0], logs[:, 1] - origin[1], log_loss), origin


def _rung(used: Sequence[tuple[Cell, ArmCell]], rung: str) -> _Rung:
    rows = [row for row, (cell, _) in enumerate(used) if cell.rung == rung]
    seeds = sorted({seed for row in rows for seed in used[row][1].losses})
    losses = np.array([[used[row][1].losses.get(seed, np.nan) for seed in seeds] for row in rows])
    return _Rung(losses, np.array(rows))


def _samples(data: Data, rungs: Sequence[_Rung], draws: int) -> list[Data]:
    random = np.random.default_rng(0)
    samples: list[Data] = []
    for _ in range(draws):
        chosen = [rungs[position] for position in _chosen_rungs(data, rungs, random)]
        means = [_one_draw(rung.losses, random) for rung in chosen]
        rows = np.concatenate([rung.rows for rung in chosen])
        samples.append(data.take(rows, np.log(np.concatenate(means))))
    return samples


def _chosen_rungs(data: Data, rungs: Sequence[_Rung], random: np.random.Generator) -> Array:
    """Positions of rungs, drawn until three differ and every arm is on two."""
    while True:
        chosen = random.integers(len(rungs), size=len(rungs))
        distinct = np.unique(chosen)
        present = [np.unique(data.arm[rungs[position].rows]) for position in distinct]
        _, times = np.unique(np.concatenate(present), return_counts=True)
        if len(distinct) >= MIN_RUNGS and len(times) == len(data.arms) and times.min() >= 2:
            return chosen


def _one_draw(losses: Array, random: np.random.Generator) -> Array:
    while not len(counts := seed_weights(losses, 1, random)):
        pass
    return drawn_means(losses, counts)[0]


def _falls(data: Data, samples: Sequence[Data], freedom: int) -> bool:
    """Whether the slope of log L against log N D is below zero, with its interval."""
    drawn = np.array([_slope(sample) for sample in samples])
    return estimate(_slope(data), drawn, freedom).known == "lower"


def _slope(data: Data) -> float:
    return float(np.polyfit(data.log_size + data.log_tokens, data.log_loss, 1)[0])


def _fit_both(data: Data, samples: Sequence[Data], freedom: int) -> tuple[Array, list[Array], bool]:
    """The coefficients, those of each draw, and whether exponents are shared."""
    shared = solve(data, starts(data))
    drawn = [solve(sample, [shared]) for sample in samples]
    arms = len(data.arms)
    if arms == 1:
        return shared, drawn, True
    own = solve(data, [_with_own_exponents(shared, arms)])
    drawn_own = [solve(sample, [own]) for sample in samples]
    if _exponents_differ(own, np.array(drawn_own), arms, freedom):
        return own, drawn_own, False
    return shared, drawn, True


def _with_own_exponents(theta: Array, arms: int) -> Array:
    return np.concatenate([theta[:1], np.repeat(theta[1:3], arms), theta[3:]])


def _exponents_differ(best: Array, drawn: Array, arms: int, freedom: int) -> bool:
    """Whether an arm's exponent differs from the first arm's beyond what chance explains."""
    level = 1 - (1 - LEVEL) / (2 * (arms - 1))
    for first in (1, 1 + arms):
        for other in range(first + 1, first + arms):
            value, values = float(best[other] - best[first]), drawn[:, other] - drawn[:, first]
            if estimate(value, values, freedom, level).known != "not known":
                return True
    return False


def _quality(data: Data, theta: Array) -> tuple[float, float]:
    """Root mean square of the residuals of log L, and the adjusted share of the variance that is explained."""
    missed, n = residuals(theta, data), len(data.log_loss)
    unexplained = (missed @ missed / max(1, n - len(theta))) / np.var(data.log_loss, ddof=1)
    return float(np.sqrt(np.mean(missed**2))), 1 - float(unexplained)
