"""Lists what limits the findings of a fit, one sentence or two each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from query_experts.common import formatting as text
from query_experts.study.ladder.fit import LARGE_SIZES, Fit
from query_experts.study.ladder.gaps import BASELINES, Cell, Gap
from query_experts.study.ladder.law import Law

WIDE = 3  # an arm whose seeds range over so many times as much as the median arm's is named


def limits(fit: Fit) -> list[str]:
    return [
        *_absent(fit),
        *_unplanned(fit),
        *_divergences(fit),
        *_weak_dense(fit),
        *_spread(fit),
        *_pairs(fit),
        *_chance(fit),
        *_law(fit),
        *_scale(fit),
    ]


def _gaps(fit: Fit) -> list[Gap]:
    return [gap for cell in fit.cells for own in cell.arms.values() for gap in own.gaps.values()]


def _absent(fit: Fit) -> Iterator[str]:
    absent = [base for base in BASELINES if base not in fit.arms]
    if fit.cells and absent:
        yield f"No run of {text.join_words(absent)}, so no arm is compared with {'it' if len(absent) == 1 else 'them'}."


def _unplanned(fit: Fit) -> Iterator[str]:
    if fit.unplanned:
        named = [f"{rung} ({text.plural(count, 'result')})" for rung, count in fit.unplanned.items()]
        yield f"In the folder of results, counted here, and not in the ladder's plan: {', '.join(named)}."


def _divergences(fit: Fit) -> Iterator[str]:
    if fit.diverged:
        seeds: dict[tuple[str, str], set[int]] = {}
        for cell in fit.cells:
            for arm, own in cell.arms.items():
                seeds.setdefault((arm, cell.rung), set()).update(own.diverged)
        named = [f"{arm} at {rung}, {text.name_seeds(sorted(own))}" for (arm, rung), own in seeds.items() if own]
        yield (
            f"{text.plural(fit.diverged, 'result')} of runs that diverged, left out of means and fits: "
            f"{'; '.join(named)}."
        )


def _weak_dense(fit: Fit) -> Iterator[str]:
    """Where fewer heads are better than dense, as then a lower loss than dense's isn't routing's."""
    for cell in fit.cells:
        lower = [arm for arm in ("static", "half") if (gap := cell.gap(arm, "dense")) and gap.known == "lower"]
        if lower:
            yield (
                f"At {cell.rung}, {cell.budget:.0%} of its tokens, {text.join_words(lower)} without routing "
                f"{'has' if len(lower) == 1 else 'have'} a lower loss than dense: a lower loss than dense's says "
                "nothing about routing there."
            )


def _spread(fit: Fit) -> Iterator[str]:
    """Arms whose seeds lie far apart, as where some learn late: a mean and its interval describe them badly."""
    for cell in _last_cells(fit):
        ranges = {arm: max(own.losses.values()) - min(own.losses.values())
                  for arm, own in cell.arms.items() if own.counts}  # fmt: skip
        for arm, own in ranges.items():
            if len(ranges) > 2 and own > WIDE * statistics.median(ranges.values()):
                yield (
                    f"The losses of {arm} at {cell.rung}, {cell.budget:.0%} of its tokens, range over {own:.3f} nats, "
                    f"more than {WIDE} times as far as most arms': their mean and interval describe them badly."
                )


def _last_cells(fit: Fit) -> list[Cell]:
    """The largest budget of each rung."""
    return [*{cell.rung: cell for cell in fit.cells}.values()]


def _pairs(fit: Fit) -> Iterator[str]:
    gaps = _gaps(fit)
    pairs, marked = sum(gap.pairs for gap in gaps), sum(len(gap.marked) for gap in gaps)
    if marked:
        yield (
            f"{marked:,} of {text.plural(pairs, 'pair')} used different processor instructions, versions of torch or, "
            "without a tag, code that isn't of one commit."
        )
    for count, why in (
        (sum(len(gap.other_tag) for gap in gaps), "the code of the two runs has different tags"),
        (sum(len(gap.other_tokens) for gap in gaps), "the tokens of the two runs have different hashes"),
    ):
        if count:
            yield f"{text.plural(count, 'pair')} left out, as {why}."


def _chance(fit: Fit) -> Iterator[str]:
    intervals = sum(gap.has_interval for gap in _gaps(fit))
    if intervals:
        yield (
            f"Of {text.plural(intervals, 'interval')} about one in twenty misses by chance; budgets of a run and arms "
            "that share a baseline aren't independent."
        )


def _law(fit: Fit) -> Iterator[str]:
    if isinstance(fit.law, Law) and fit.law.seeds_alone:
        yield (
            "The law comes from three rungs, so its intervals hold the spread of seeds alone and no scatter of rungs. "
            "What it would say far beyond the ladder is not known: it is extrapolated from four rungs on."
        )


def _scale(fit: Fit) -> Iterator[str]:
    if fit.cells:
        parameters, tokens = fit.cells[-1].size
        yield (
            f"The largest model has {text.short(parameters)} parameters without embeddings and {text.short(tokens)} "
            f"training tokens. The paper's has about 250M parameters, {LARGE_SIZES[0] / parameters:,.0f} times as many."
        )
