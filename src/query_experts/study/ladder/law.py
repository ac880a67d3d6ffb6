"""Fits a scaling law L(N, D) = E + A N^-alpha + B D^-beta to the mean losses of all arms, rungs and budgets.

N counts the parameters of the rung's dense arm without embeddings, for every arm, and D training tokens. A budget is so
many tokens for each parameter of that count, and arms are compared at the same shape, so the law's gap answers the same
question as pairs and lines. The form is that of Hoffmann et al. (arXiv 2203.15556). As there, and as corrected by
Besiroglu et al. (arXiv 2404.10102), the fit minimises the Huber loss of the residuals of log L, from several starts.

E, alpha and beta are shared by the arms; A and B are each arm's own. E stays shared because it belongs to the text.
The exponents become each arm's own only if the data say so: the interval of an arm's alpha or beta minus the first
arm's has to exclude zero, at a level that allows for the number of such differences (Bonferroni).

Intervals come from fits that leave out one rung each (jackknife, Student's t on rungs - 1). Budgets, arms and seeds of
a rung share what belongs to its size alone, so the rungs are what is independent. A law of three sizes meets them all
exactly, so four rungs are the fewest that can show how much it misses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from query_experts.study.ladder.estimates import LEVEL, Array, Estimate, jackknife
from query_experts.study.ladder.gaps import ArmCell, Cell
from query_experts.study.ladder.solver import Coefficients, Data, namer, residuals, solve, starts

MIN_RUNGS = 4
MIN_EXPLAINED = 0.5  # share of the variance of log L between cells, adjusted for the number of coefficients


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Args:
        shared: Whether the arms share alpha and beta.
        best: The coefficients.
        left_out: The coefficients without each rung.
        rungs: Number of rungs that it is fitted to.
        cells: Number of mean losses that it is fitted to.
        error: Root mean square of the residuals of log L.
        explained: Share of the variance of log L that it explains, adjusted for the number of coefficients.
    """

    shared: bool
    best: Coefficients
    left_out: list[Coefficients]
    rungs: int
    cells: int
    error: float
    explained: float

    @property
    def arms(self) -> list[str]:
        return list(self.best.A)

    @property
    def scatter(self) -> float:
        """Variance of log L around the law, adjusted for the number of coefficients."""
        coefficients = 1 + 2 * len(self.arms) + 2 * (1 if self.shared else len(self.arms))
        return self.error**2 * self.cells / max(1, self.cells - coefficients)

    def of_rung(self, arm: str, parameters: float, tokens: float) -> Estimate:
        """The loss of an arm at a rung, whose own distance from the law adds to the law's interval."""
        value = self.best.loss(arm, parameters, tokens)
        left_out = np.array([coefficients.loss(arm, parameters, tokens) for coefficients in self.left_out])
        return jackknife(value, left_out, more=self.scatter * value**2)

    def estimate(self, value: Callable[[Coefficients], float]) -> Estimate:
        """A function of the coefficients, with its interval."""
        return jackknife(value(self.best), np.array([value(coefficients) for coefficients in self.left_out]))


@dataclass(frozen=True)
class NoLaw:
    """Why there is no law: a sentence."""

    why: str


def fit_law(cells: Sequence[Cell]) -> Law | NoLaw:
    """Fits the law to the cells that have three seeds or more, of the arms that have such cells on four rungs."""
    used = _used(cells)
    rungs = list(dict.fromkeys(cell.rung for cell, _ in used))
    if len(rungs) < MIN_RUNGS:
        return NoLaw(f"A law needs four rungs where an arm has three seeds; there are {len(rungs)}.")
    if len({cell.budget for cell, _ in used}) < 2:
        return NoLaw("A law needs two budgets: with one, tokens grow as parameters do, and their terms can't be told "
                     "apart.")  # fmt: skip
    data, origin = _data(used)
    without = [data.take(np.array([cell.rung != rung for cell, _ in used])) for rung in rungs]
    coefficients, means = 3 + 2 * len(data.arms), min(len(each.log_loss) for each in without)
    if means <= coefficients:
        return NoLaw(f"A law of {coefficients} coefficients needs more than {means} mean losses without any one rung.")
    if jackknife(_slope(data), np.array([_slope(each) for each in without])).known != "lower":
        return NoLaw("The loss doesn't fall with size and tokens by more than rungs differ, so there is no law.")
    best, left_out, shared = _fit_both(data, without)
    error, explained = _quality(data, best)
    if explained < MIN_EXPLAINED:
        share = f"{max(0, explained):.0%}"
        return NoLaw(f"A law would explain {share} of the variance between rungs and budgets, too little to be one.")
    name = namer(data.arms, origin)
    return Law(shared, name(best), [*map(name, left_out)], len(rungs), len(data.log_loss), error, explained)


def _used(cells: Sequence[Cell]) -> list[tuple[Cell, ArmCell]]:
    counting = [(cell, own) for cell in cells for own in cell.arms.values() if own.counts]
    rungs: dict[str, set[str]] = {}
    for cell, own in counting:
        rungs.setdefault(own.arm, set()).add(cell.rung)
    return [(cell, own) for cell, own in counting if len(rungs[own.arm]) >= MIN_RUNGS]


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
