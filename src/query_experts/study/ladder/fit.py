"""Puts together what the results of a ladder say: gaps, a law, lines, a prediction that was checked, extrapolations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from query_experts.model.arms import in_order
from query_experts.study.ladder.estimates import Estimate
from query_experts.study.ladder.gaps import CONTROLS, Cell, cells_of, compared, training_flops
from query_experts.study.ladder.law import Law, NoLaw, fit_law
from query_experts.study.ladder.line import GapLine, fit_line
from query_experts.study.ladder.results import LadderResult
from query_experts.study.statistics import PairedDifference, paired_difference

LARGE_SIZES = (250_000_000, 1_000_000_000, 7_000_000_000)
TOKENS_PER_PARAMETER = 20

By = Literal["law", "line"]


@dataclass(frozen=True)
class Prediction:
    """The largest rung as the smaller ones predict it, and as it was measured.

    Args:
        base: The baseline of a gap; None for the loss of the arm itself.
        seeds_alone: Whether the predicted interval holds the spread of seeds alone and no scatter of rungs.
    """

    arm: str
    base: str | None
    by: By
    rung: str
    predicted: Estimate
    measured: Estimate
    seeds_alone: bool

    @property
    def allowed(self) -> float:
        """The difference that both intervals together allow."""
        return math.hypot(self.predicted.half_width, self.measured.half_width)

    @property
    def held(self) -> bool:
        """Whether the two differ by no more than that."""
        return abs(self.predicted.value - self.measured.value) <= self.allowed


@dataclass(frozen=True)
class Extrapolation:
    """The gap of an arm from a baseline at a size far beyond the ladder, with 20 tokens a parameter.

    Args:
        parameters: Of the dense arm, without embeddings.
    """

    arm: str
    base: str
    parameters: int
    by: By
    gap: Estimate


@dataclass(frozen=True)
class Fit:
    """What the results of a ladder say.

    Args:
        runs: Number of results, of all budgets.
        diverged: Number of those whose run diverged.
        cells: Losses and gaps of every rung and budget, the smallest first.
        law: The scaling law, or why there is none.
        lines: Gaps against compute, of those that have an interval on three rungs at all tokens.
        predictions: The largest rung left out and predicted; empty where too few rungs remain.
        extrapolations: Of the studied arms; by a law only if its intervals hold the scatter of rungs.
        unplanned: Rung -> the number of results among them that the ladder's plan doesn't have.
    """

    runs: int
    diverged: int
    cells: list[Cell]
    law: Law | NoLaw
    lines: list[GapLine]
    predictions: list[Prediction]
    extrapolations: list[Extrapolation]
    unplanned: dict[str, int] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return in_order(arm for cell in self.cells for arm in cell.arms)

    @property
    def rungs(self) -> list[str]:
        """The smallest first."""
        return list(dict.fromkeys(cell.rung for cell in self.cells))

    def line(self, arm: str, base: str) -> GapLine | None:
        return next((line for line in self.lines if (line.arm, line.base) == (arm, base)), None)


def fit_ladder(results: Sequence[LadderResult], unplanned: Mapping[str, int] | None = None) -> Fit:
    """Fits whatever results there are; `unplanned` as in Fit."""
    cells = cells_of(results)
    law = fit_law(cells)
    lines = _lines(cells)
    return Fit(
        runs=len(results),
        diverged=sum(result.diverged for result in results),
        cells=cells,
        law=law,
        lines=lines,
        predictions=_predictions(cells),
        extrapolations=_extrapolations(law, lines),
        unplanned=dict(unplanned or {}),
    )


def _lines(cells: Sequence[Cell]) -> list[GapLine]:
    arms = in_order(arm for cell in cells for arm in cell.arms)
    fitted = (fit_line(cells, arm, base) for arm, base in compared(arms))
    return [line for line in fitted if line is not None]


def _predictions(cells: Sequence[Cell]) -> list[Prediction]:
    """Predicts the largest budget of the largest rung whose arms have three seeds from the rungs below it."""
    counting = [cell for cell in cells if any(own.counts for own in cell.arms.values())]
    if not counting:
        return []
    last = counting[-1]
    rungs = list(dict.fromkeys(cell.rung for cell in cells))
    below = [cell for cell in cells if rungs.index(cell.rung) < rungs.index(last.rung)]
    law = fit_law(below)
    return [*_by_law(law, last), *_by_lines(below, last)]


def _by_law(law: Law | NoLaw, cell: Cell) -> list[Prediction]:
    if isinstance(law, NoLaw):
        return []
    found = []
    for arm, own in cell.arms.items():
        measured = _estimate(paired_difference(own.losses, dict.fromkeys(own.losses, 0.0)))
        if arm in law.arms and measured is not None:
            predicted = law.of_rung(arm, own.size, own.train_tokens)
            found.append(Prediction(arm, None, "law", cell.rung, predicted, measured, law.seeds_alone))
    return found


def _by_lines(below: Sequence[Cell], cell: Cell) -> list[Prediction]:
    if cell.budget < 1:
        return []
    found = []
    for arm, base in compared(list(cell.arms)):
        gap = cell.gap(arm, base)
        measured = _estimate(gap.difference) if gap is not None else None
        line = fit_line(below, arm, base) if measured is not None else None
        if line is not None and measured is not None:
            predicted = line.of_rung(cell.compute(base))
            found.append(Prediction(arm, base, "line", cell.rung, predicted, measured, seeds_alone=False))
    return found


def _estimate(difference: PairedDifference | None) -> Estimate | None:
    """A paired difference that has an interval."""
    if difference is None or difference.low is None:
        return None
    return Estimate(difference.mean, difference.low, difference.high)


def _extrapolations(law: Law | NoLaw, lines: Sequence[GapLine]) -> list[Extrapolation]:
    far = law if isinstance(law, Law) and not law.seeds_alone else None
    by_law = set(compared(far.arms)) if far is not None else set()
    pairs = dict.fromkeys([*((line.arm, line.base) for line in lines), *sorted(by_law)])
    found: list[Extrapolation] = []
    for arm, base in pairs:
        if arm in CONTROLS:
            continue
        for size in LARGE_SIZES:
            tokens = TOKENS_PER_PARAMETER * size
            found += [
                Extrapolation(arm, base, size, "line", line.of_rung(training_flops(size, tokens)))
                for line in lines
                if (line.arm, line.base) == (arm, base)
            ]
            if far is not None and (arm, base) in by_law:
                gap = far.estimate(lambda c, a=arm, b=base, n=size, d=tokens: c.gap(a, b, n, d))  # type: ignore[misc]
                found.append(Extrapolation(arm, base, size, "law", gap))
    return found
