"""Computes the findings: the loss of each studied arm relative to each baseline, and how certain the difference is.

Also lists what limits a comparison. Every word depends on the numbers only, whichever arm they favour.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from query_experts.common import formatting as text
from query_experts.study.report.rows import BASELINES, Row, arms_of, completed_runs, seeds_of, summary_rows
from query_experts.study.results import Comparison
from query_experts.study.statistics import MIN_SEEDS_FOR_INTERVAL, PairedDifference, paired_difference, sign

CONTROLS = (*BASELINES, "half", "frozen")  # all other arms are studied
TINY_PARAMETERS = 50e6
TOKENS_PER_PARAMETER = 20  # about compute-optimal training (arXiv 2203.15556)
FEW_HELD_OUT = 20_000  # tokens
MANY_EPOCHS = 4  # up to which repeated text is about as good as new text (arXiv 2305.16264)

Verdict = Literal["lower", "higher", "same", "mixed", "not comparable"]
Certainty = Literal["excludes zero", "includes zero", "too few seeds", "one seed"]


@dataclass(frozen=True)
class Finding:
    """The validation loss of an arm minus that of a baseline, over the seeds that have both.

    Args:
        mean: Mean difference; None without such a seed.
        low: Lower end of the 95% interval of the mean; None below three seeds.
        high: Upper end.
        lower_on: Number of seeds on which the arm has the lower loss.
        higher_on: Number of seeds on which it has the higher loss.
        seeds: Number of seeds that have both losses.
        asked: Number of seeds of the comparison.
        verdict: The sign of the difference, if it is the same on all seeds; else mixed.
        certainty: Whether the interval excludes zero, or why there is none; None without a difference.
        diverged: Seeds that diverged, of those of the two arms that have any.
    """

    arm: str
    baseline: str
    mean: float | None
    low: float | None
    high: float | None
    lower_on: int
    higher_on: int
    seeds: int
    asked: int
    verdict: Verdict
    certainty: Certainty | None
    diverged: dict[str, list[int]]


def findings(comparison: Comparison) -> list[Finding]:
    """A finding for each studied arm and each control that has a run."""
    rows = {row.arm: row for row in summary_rows(comparison)}
    asked = len(seeds_of(comparison))
    return [
        _finding(rows[arm], rows[base], asked)
        for arm in rows
        if arm not in CONTROLS
        for base in CONTROLS
        if base in rows
    ]


def _finding(row: Row, base: Row, asked: int) -> Finding:
    difference = paired_difference(row.losses, base.losses)
    signs = [sign(value) for value in difference.differences.values()] if difference is not None else []
    return Finding(
        arm=row.arm,
        baseline=base.arm,
        mean=difference.mean if difference is not None else None,
        low=difference.low if difference is not None else None,
        high=difference.high if difference is not None else None,
        lower_on=signs.count(-1),
        higher_on=signs.count(1),
        seeds=len(signs),
        asked=asked,
        verdict=_verdict(signs),
        certainty=_certainty(difference),
        diverged={each.arm: each.diverged for each in (row, base) if each.diverged},
    )


def _verdict(signs: list[int]) -> Verdict:
    if not signs:
        return "not comparable"
    if len(set(signs)) > 1:
        return "mixed"
    return "lower" if signs[0] < 0 else "higher" if signs[0] > 0 else "same"


def _certainty(difference: PairedDifference | None) -> Certainty | None:
    if difference is None or not any(sign(value) for value in difference.differences.values()):
        return None
    seeds = len(difference.differences)
    if seeds < MIN_SEEDS_FOR_INTERVAL:
        return "one seed" if seeds == 1 else "too few seeds"
    return "excludes zero" if difference.excludes_zero else "includes zero"


def limits(comparison: Comparison) -> list[str]:
    """What limits the findings, at most six sentences."""
    return [
        *_absent_baselines(comparison),
        *_spread_of_seeds(comparison),
        *_scale(comparison),
        *_text(comparison),
        *_unequal_training(comparison),
    ]


def _absent_baselines(comparison: Comparison) -> Iterator[str]:
    absent = [base for base in BASELINES if base not in arms_of(comparison)]
    if absent:
        verb = "was" if len(absent) == 1 else "were"
        yield f"No arm is compared with {text.join_words(absent)}, which {verb} not asked for."


def _spread_of_seeds(comparison: Comparison) -> Iterator[str]:
    """How much the difference from static changes with the seed, for the studied arm in which it changes most."""
    widest = max(
        (
            (statistics.stdev(difference.differences.values()), (difference.high - difference.low) / 2, row.arm)
            for row in summary_rows(comparison)
            for base, difference in row.versus.items()
            if row.arm not in CONTROLS and base == "static" and difference is not None
            if difference.low is not None and difference.high is not None
        ),
        default=None,
    )
    if widest is not None:
        spread, reach, arm = widest
        yield (
            f"Between seeds, {arm} minus static varies with a standard deviation of {spread:.4f}: here a mean "
            f"difference of less than {reach:.4f} can't be told from none."
        )


def _scale(comparison: Comparison) -> Iterator[str]:
    runs = completed_runs(comparison)
    if not runs:
        return
    size, seen = max(run.parameters.total for run in runs), max(run.train_tokens for run in runs)
    if size < TINY_PARAMETERS:
        yield (
            f"The models are tiny ({text.short(size)} parameters, {text.short(seen)} training tokens). The paper has "
            "250M and 30B; these results need not hold there."
        )
    if seen < 0.9 * TOKENS_PER_PARAMETER * size:
        yield (
            f"Training stopped at {seen / size:.2g} tokens a parameter (about {TOKENS_PER_PARAMETER} is usual), where "
            "loss still falls fast: the order of the arms may change with more."
        )


def _text(comparison: Comparison) -> Iterator[str]:
    """Whether few tokens are held out, or the training text is repeated often."""
    data = comparison.data
    if data is None or not completed_runs(comparison):
        return
    lines = []
    if data.validation_tokens_used and data.validation_tokens_used < FEW_HELD_OUT:
        lines.append(
            f"Validation loss is taken over {data.validation_tokens_used:,} held-out tokens: another text may change "
            "it by more than the arms differ."
        )
    if data.epochs and data.epochs > MANY_EPOCHS:
        epochs = f"{data.epochs:,.0f}" if data.epochs >= 10 else f"{data.epochs:.1f}"
        lines.append(f"The training text is repeated {epochs} times, so models memorise it.")
    if lines:
        yield " ".join(lines)


def _unequal_training(comparison: Comparison) -> Iterator[str]:
    tokens = {run.train_tokens for run in completed_runs(comparison)}
    if len(tokens) > 1:
        low, high = text.short(min(tokens)), text.short(max(tokens))
        yield f"Runs saw unequal numbers of tokens ({low} to {high}), so losses are not at equal training."
