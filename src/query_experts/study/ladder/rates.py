"""Finds the best learning rate of each rung and arm from the results of a sweep.

The results of a sweep are those whose variant is a learning rate. Near its minimum the loss is about a parabola in the
logarithm of the rate, so the optimum is the vertex of the parabola through the mean losses of the best rate of the grid
and its two neighbours. The same for each seed alone gives the spread of the optimum.

Seeds differ by as much as rates do. So a mean is taken over the same seeds at every rate: those that finished at all
rates at which no run diverged. A rate at which one diverged is never the best and no neighbour of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from query_experts.common import formatting as text
from query_experts.model.arms import in_order
from query_experts.study.ladder.gaps import rungs_by_size
from query_experts.study.ladder.results import LadderResult
from query_experts.study.report.table import Table


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of an arm at a rung.

    Args:
        budget: The largest that was swept.
        losses: Mean validation loss by rate, over the seeds of `by_seed`; without the rates where one of them lacks it.
        diverged: Number of runs that diverged, by rate; only of those rates that have any.
        rates: All at which a run finished.
        optimum: The vertex of the parabola; None where the best rate is an end of those at which no run diverged.
        by_seed: The vertex for each seed alone, with None for the same reason. Only of the seeds that finished at
            every rate at which no run diverged.
    """

    rung: str
    arm: str
    budget: float
    losses: dict[float, float]
    diverged: dict[float, int]
    rates: list[float]
    optimum: float | None
    by_seed: dict[int, float | None]

    @property
    def inside(self) -> bool:
        """Whether the optimum lies inside the grid; otherwise the grid has to grow."""
        return self.optimum is not None

    @property
    def spread(self) -> float | None:
        """Doublings between the lowest and the highest optimum of a seed; None with fewer than two."""
        found = [math.log2(rate) for rate in self.by_seed.values() if rate is not None]
        return max(found) - min(found) if len(found) > 1 else None


def best_rate(results: Sequence[LadderResult]) -> list[BestRate]:
    """The best rate of every rung and arm whose learning rate was swept, the smallest rung first.

    Other results are left out: those of rungs' own settings, and of sweeps of another setting.
    """
    swept = [result for result in results if result.swept == "learning_rate"]
    found = []
    for rung in rungs_by_size(swept):
        own = [result for result in swept if result.rung == rung]
        for arm in in_order(result.arm for result in own):
            found.append(_best(rung, arm, [result for result in own if result.arm == arm]))
    return found


def _best(rung: str, arm: str, results: Sequence[LadderResult]) -> BestRate:
    budget = max(result.budget for result in results)
    losses: dict[int, dict[float, float]] = {}  # by seed and rate
    diverged: dict[float, int] = {}
    for result in results:
        if result.budget != budget:
            continue
        own = losses.setdefault(result.seed, {})
        if result.validation_loss is not None and not result.diverged:
            own[result.swept_to] = result.validation_loss
        else:
            diverged[result.swept_to] = diverged.get(result.swept_to, 0) + 1
    rates = sorted({rate for own in losses.values() for rate in own})
    sound = [rate for rate in rates if rate not in diverged]
    seeds = [seed for seed in sorted(losses) if losses[seed].keys() >= {*sound}]
    means = {rate: statistics.fmean(losses[seed][rate] for seed in seeds)
             for rate in rates if seeds and all(rate in losses[seed] for seed in seeds)}  # fmt: skip
    by_seed = {seed: _vertex({rate: losses[seed][rate] for rate in sound}) for seed in seeds}
    optimum = _vertex({rate: means[rate] for rate in sound}) if seeds else None
    return BestRate(rung, arm, budget, means, dict(sorted(diverged.items())), rates, optimum, by_seed)


def excess(best: BestRate, rate: float) -> float | None:
    """What the loss at a rate lies above that at the optimum, by the parabola; None without an optimum."""
    found = _parabola({rate: loss for rate, loss in best.losses.items() if rate not in best.diverged})
    if found is None or best.optimum is None:
        return None
    return found[1] * math.log2(rate / best.optimum) ** 2


def _vertex(losses: Mapping[float, float]) -> float | None:
    """The rate at the vertex of the parabola; None where the lowest loss is at an end."""
    found = _parabola(losses)
    return None if found is None else found[0]


def _parabola(losses: Mapping[float, float]) -> tuple[float, float] | None:
    """The rate at the vertex of the parabola, and its curvature in nats a squared doubling."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda position: losses[rates[position]], default=0)
    if not 0 < best < len(rates) - 1:
        return None
    near = rates[best - 1 : best + 2]
    logs = np.log2(near) - math.log2(near[1])
    curvature, slope, _ = np.polyfit(logs, [losses[rate] for rate in near], 2)
    vertex = near[1] * 2 ** (-slope / (2 * curvature)) if curvature > 0 else near[1]
    return float(vertex), float(curvature)


def rates_table(found: Sequence[BestRate]) -> Table:
    return Table(
        title="Learning rates",
        note=" ".join(
            [
                "Loss: mean over the seeds that finished at every rate where no run diverged; x: diverged. Optimum: of "
                "a parabola in the logarithm of the rate through the three such rates around the lowest mean; outside: "
                "the lowest is an end of them, so the grid has to grow or hold more rates there.",
                *_comparisons(found),
            ]
        ),
        head=["arm", "rung", "rate, loss", "optimum", "by seed"],
        body=[[each.arm, each.rung, _grid(each), _rate(each.optimum), _seeds(each)] for each in found],
        left=(0, 1),
    )


def _grid(best: BestRate) -> str:
    rates = sorted({*best.rates, *best.diverged})
    return "\n".join(
        f"{rate:.3g}  {text.fixed(best.losses.get(rate))}"
        + (f" ({best.diverged[rate]}x)" if rate in best.diverged else "")
        for rate in rates
    )


def _rate(rate: float | None) -> str:
    return "outside" if rate is None else f"{rate:.3g}"


def _seeds(best: BestRate) -> str:
    return "\n".join(f"{seed}: {_rate(rate)}" for seed, rate in best.by_seed.items())


def _comparisons(found: Sequence[BestRate]) -> list[str]:
    """How far the optima of arms and of seeds lie apart, a sentence a rung: arms that differ no more share a rate."""
    sentences = []
    for rung in dict.fromkeys(each.rung for each in found):
        own = [each for each in found if each.rung == rung]
        optima = [math.log2(each.optimum) for each in own if each.optimum is not None]
        spreads = [each.spread for each in own if each.spread is not None]
        if len(optima) > 1 and spreads:
            between, within = max(optima) - min(optima), max(spreads)
            relation = "more than" if between > within else "no more than"
            sentences.append(
                f"{rung}: optima of arms lie within {between:.2f} doublings, {relation} those of one arm's seeds "
                f"({within:.2f})."
            )
    return sentences
