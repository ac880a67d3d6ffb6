"""Fits a scaling law L(N, D) = E + A N^-alpha + B D^-beta to the mean losses of all arms, rungs and budgets.

N counts the parameters of the rung's dense arm without embeddings, for every arm, and D training tokens. A budget is so
many tokens for each parameter of that count, and arms are compared at the same shape, so the law's gap answers the same
question as pairs and lines. The form is that of Hoffmann et al. (arXiv 2203.15556). As there, and as corrected by
Besiroglu et al. (arXiv 2404.10102), the fit minimises the Huber loss of the residuals of log L, from several starts.

E, alpha and beta are shared by the arms; A and B are each arm's own. E stays shared because it belongs to the text.
The exponents become each arm's own only if the data say so: the interval of an arm's alpha or beta minus the first
arm's has to exclude zero, at a level that allows for the number of such differences (Bonferroni).

Intervals come from fits that leave out one rung each (jackknife, Student's t on rungs - 1). Budgets, arms and seeds of
a rung share what belongs to its size alone, so the rungs are what is independent, and their spread holds that of the
seeds.

A law of three sizes meets them all nearly exactly, so four rungs are the fewest that can show how much it misses. With
three its intervals come from a bootstrap over seeds and hold nothing else. They can't tell exponents apart, which the
arms then share, and nothing far beyond the ladder is computed from such a law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from query_experts.study.ladder.bootstrap import drawn_means, seed_table
from query_experts.study.ladder.estimates import LEVEL, Array, Estimate, bootstrap, jackknife
from query_experts.study.ladder.gaps import ArmCell, Cell
from query_experts.study.ladder.solver import Coefficients, Data, namer, residuals, solve, starts

MIN_RUNGS = 3
MIN_RUNGS_TO_LEAVE_OUT = 4
DRAWS = 200
MIN_EXPLAINED = 0.5  # share of the variance of log L between cells, adjusted for the number of coefficients


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Args:
        shared: Whether the arms share alpha and beta.
        best: The coefficients.
        others: The coefficients without each rung, or in each draw of seeds.
        seed_freedom: Where the draws are of seeds, the fewest seeds of a mean minus one: the largest rung has the
            fewest seeds and moves the law most. None where rungs are left out.
        rungs: Number of rungs that it is fitted to.
        cells: Number of mean losses that it is fitted to.
        error: Root mean square of the residuals of log L.
        explained: Share of the variance of log L that it explains, adjusted for the number of coefficients.
    """

    shared: bool
    best: Coefficients
    others: list[Coefficients]
    seed_freedom: int | None
    rungs: int
    cells: int
    error: float
    explained: float

    @property
    def arms(self) -> list[str]:
        return list(self.best.A)

    @property
    def seeds_alone(self) -> bool:
        """Whether the intervals hold the spread of seeds alone and no scatter of rungs."""
        return self.seed_freedom is not None

    @property
    def scatter(self) -> float:
        """Variance of log L around the law, adjusted for the number of coefficients."""
        coefficients = 1 + 2 * len(self.arms) + 2 * (1 if self.shared else len(self.arms))
        return self.error**2 * self.cells / max(1, self.cells - coefficients)

    def of_rung(self, arm: str, parameters: float, tokens: float) -> Estimate:
        """The loss of an arm at a rung, whose own distance from the law adds to the law's interval."""
        own = self.best.loss(arm, parameters, tokens)
        return self.estimate(lambda coefficients: coefficients.loss(arm, parameters, tokens), self.scatter * own**2)

    def estimate(self, value: Callable[[Coefficients], float], scatter: float = 0.0) -> Estimate:
        """A function of the coefficients, with its interval.

        Args:
            scatter: A variance to add; left out of an interval of seeds alone.
        """
        others = np.array([value(coefficients) for coefficients in self.others])
        if self.seed_freedom is not None:
            return bootstrap(value(self.best), others, self.seed_freedom)
        return jackknife(value(self.best), others, more=scatter)


@dataclass(frozen=True)
class NoLaw:
    """Why there is no law: a sentence."""

    why: str


def fit_law(cells: Sequence[Cell]) -> Law | NoLaw:
    """Fits the law to the cells that have three seeds or more, of the arms that have such cells on enough rungs.

    Enough are four, or three where no arm has four; then the intervals hold seeds alone.
    """
    used, most = _used(cells)
    if most < MIN_RUNGS:
        there = f"there {'is' if most == 1 else 'are'} {most}"
        return NoLaw(f"A law, lines and predictions need three rungs where an arm has three seeds; {there}.")
    rungs, seeds_alone = list(dict.fromkeys(cell.rung for cell, _ in used)), most < MIN_RUNGS_TO_LEAVE_OUT
    if len({cell.budget for cell, _ in used}) < 2:
        return NoLaw("A law needs two budgets: with one, tokens grow as parameters do, and their terms can't be told "
                     "apart.")  # fmt: skip
    data, origin = _data(used)
    without = [data.take(np.array([cell.rung != rung for cell, _ in used])) for rung in rungs]
    coefficients = 3 + 2 * len(data.arms)
    means = min(len(each.log_loss) for each in ([data] if seeds_alone else without))
    if means <= coefficients:
        which = "" if seeds_alone else " without any one rung"
        return NoLaw(f"A law of {coefficients} coefficients needs more than {means} mean losses{which}.")
    if jackknife(_slope(data), np.array([_slope(each) for each in without])).known != "lower":
        return NoLaw("The loss doesn't fall with size and tokens by more than rungs differ, so there is no law.")
    seeds = [seed_table([own.losses for cell, own in used if cell.rung == rung]) for rung in rungs]
    best, others, shared = _fit_seeds(data, seeds) if seeds_alone else _fit_both(data, without)
    error, explained = _quality(data, best)
    if explained < MIN_EXPLAINED:
        share = f"{max(0, explained):.0%}"
        return NoLaw(f"A law would explain {share} of the variance between rungs and budgets, too little to be one.")
    name = namer(data.arms, origin)
    freedom = min(len(own.losses) for _, own in used) - 1 if seeds_alone else None
    return Law(shared, name(best), [*map(name, others)], freedom, len(rungs), len(data.log_loss), error, explained)


def _used(cells: Sequence[Cell]) -> tuple[list[tuple[Cell, ArmCell]], int]:
    """What the law is fitted to, and the number of rungs of the arm that is on most."""
    counting = [(cell, own) for cell in cells for own in cell.arms.values() if own.counts]
    rungs: dict[str, set[str]] = {}
    for cell, own in counting:
        rungs.setdefault(own.arm, set()).add(cell.rung)
    most = max(map(len, rungs.values()), default=0)
    return [(cell, own) for cell, own in counting if len(rungs[own.arm]) >= min(most, MIN_RUNGS_TO_LEAVE_OUT)], most


def _data(used: Sequence[tuple[Cell, ArmCell]]) -> tuple[Data, Array]:
    """The data, and the natural logarithms of the size and tokens that theirs are relative to."""
    arms = list(dict.fromkeys(own.arm for _, own in used))
    logs = np.log([[own.size, own.train_tokens] for _, own in used])
    origin = logs.mean(axis=0)
    log_loss = np.log([own.mean for _, own in used if own.mean is not None])
    positions = np.array([arms.index(own.arm) for _, own in used])
    return Data(arms, positions, logs[:, 0] - origin[0], logs[:, 1] - origin[1], log_loss), origin


def _slope(data: Data) -> float:
    return float(np.polyfit(data.log_size + data.log_tokens, data.log_loss, 1)[0])


def _fit_seeds(data: Data, seeds: Sequence[Array]) -> tuple[Array, list[Array], bool]:
    """The coefficients, those of each draw of seeds, and that exponents are shared.

    Args:
        seeds: The losses of each rung, [rows][seeds], in the data's order.
    """
    random = np.random.default_rng(0)
    means = np.concatenate([drawn_means(table, DRAWS, random) for table in seeds], axis=1)
    best = solve(data, starts(data))
    return best, [solve(data.of_losses(log_loss), [best]) for log_loss in np.log(means)], True


def _fit_both(data: Data, without: Sequence[Data]) -> tuple[Array, list[Array], bool]:
    """The coefficients, those without each rung, and whether exponents are shared."""
    shared = solve(data, starts(data))
    left_out = [solve(each, [shared]) for each in without]
    arms = len(data.arms)
    if arms == 1:
        return shared, left_out, True
    own = solve(data, [_with_own_exponents(shared, arms)])
    own_left_out = [solve(each, [own]) for each in without]
    if _exponents_differ(own, np.array(own_left_out), arms):
        return own, own_left_out, False
    return shared, left_out, True


def _with_own_exponents(theta: Array, arms: int) -> Array:
    return np.concatenate([theta[:1], np.repeat(theta[1:3], arms), theta[3:]])


def _exponents_differ(best: Array, left_out: Array, arms: int) -> bool:
    """Whether an arm's exponent differs from the first arm's beyond what chance explains."""
    level = 1 - (1 - LEVEL) / (2 * (arms - 1))
    for first in (1, 1 + arms):
        for other in range(first + 1, first + arms):
            difference = jackknife(float(best[other] - best[first]), left_out[:, other] - left_out[:, first], level)
            if difference.known != "not known":
                return True
    return False


def _quality(data: Data, theta: Array) -> tuple[float, float]:
    """Root mean square of the residuals of log L, and the adjusted share of the variance that is explained."""
    missed, n = residuals(theta, data), len(data.log_loss)
    unexplained = (missed @ missed / max(1, n - len(theta))) / np.var(data.log_loss, ddof=1)
    return float(np.sqrt(np.mean(missed**2))), 1 - float(unexplained)
