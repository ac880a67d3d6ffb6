"""Owns the verdict: sentences on what the numbers show and what they don't, each computed from the numbers.

Nothing here praises. A sentence that says `better` has a twin that says `worse`, and which one appears is decided by
the sign of the measured difference.
"""

from __future__ import annotations

from collections.abc import Iterator

from query_experts.study import report_text as text
from query_experts.study.report_rows import (
    BASELINES,
    Comparison,
    Row,
    missing_parts,
    prefill_lengths,
    prefill_speedup,
    runs_by_arm,
    seeds_of,
    summary_rows,
)
from query_experts.study.statistics import MIN_SEEDS_FOR_INTERVAL, PairedDifference, paired_difference

TINY_PARAMETERS = 50e6
TOKENS_PER_PARAMETER = 20  # about compute-optimal training (arXiv 2203.15556)
SAME_SPEED = 0.03
PAPER = "the paper's 250M parameters and 30B tokens"


def verdict(comparison: Comparison) -> list[str]:
    """What the comparison shows and doesn't, most important first."""
    return [line for lines in verdict_by_topic(comparison).values() for line in lines]


def verdict_by_topic(comparison: Comparison) -> dict[str, list[str]]:
    """The verdict's sentences under the heading of what they are about; a topic without any is left out."""
    rows = {row.arm: row for row in summary_rows(comparison)}
    topics = {
        "Loss": [*_against_baselines(rows), *_routing_itself(rows), *_lowest(rows)],
        "How sure": [*_certainty(comparison, rows)],
        "Speed": [*_speed(comparison, rows)],
        "Routing": [*_dead_experts(comparison)],
        "What limits this": [*_sizes(rows), *_scale(comparison), *_incomplete(comparison)],
    }
    return {topic: lines for topic, lines in topics.items() if lines}


def _against_baselines(rows: dict[str, Row]) -> Iterator[str]:
    if "gqe" not in rows or not rows["gqe"].losses:
        yield "gqe has no validation loss here, so this comparison says nothing about the quality of the paper's layer."
        return
    for base in BASELINES:
        difference = rows["gqe"].versus[base]
        if difference is None:
            yield f"gqe can't be compared with {base}: no seed has a loss for both."
        else:
            yield _outcome("gqe", base, difference)


def _outcome(arm: str, base: str, difference: PairedDifference) -> str:
    """One sentence on who has the lower loss, on how many seeds, by how much, and how sure that is."""
    values = list(difference.differences.values())
    wins, losses = sum(value < 0 for value in values), sum(value > 0 for value in values)
    if len(values) == 1:
        end = f" by {abs(values[0]):.4f}" if values[0] else ""
        return f"On the one seed that both have, {arm} {_verb(values[0])} {base}{end}."
    shown = text.listed([text.signed(value) for value in values])
    if difference.same_sign:
        every = "both seeds" if len(values) == 2 else f"every one of the {len(values)} seeds"
        line = f"{arm} {_verb(values[0])} {base} on {every}: {shown}, mean {text.signed(difference.mean)}"
    else:
        line = (
            f"{arm} against {base} has no consistent winner: lower loss on {wins} of {len(values)} seeds, higher on "
            f"{losses} ({shown}, mean {text.signed(difference.mean)})"
        )
    if difference.low is None:
        return line + "."
    bracket = text.interval(difference.low, difference.high)
    if difference.excludes_zero:
        return f"{line}; the 95% interval {bracket} excludes zero."
    return f"{line}; the 95% interval {bracket} includes zero, so chance alone may explain it."


def _verb(difference: float) -> str:
    if difference == 0:
        return "has the same loss as"
    return "is better than" if difference < 0 else "loses to"


def _routing_itself(rows: dict[str, Row]) -> Iterator[str]:
    """Whether routing, rather than anything else that gqe changes, earned the difference."""
    difference = rows["gqe"].versus["static"] if "gqe" in rows else None
    if difference is not None:
        as_many = rows["gqe"].active_heads == rows["static"].active_heads
        control = "static, with as many active heads and no router" if as_many else "static, which has no router"
        if difference.excludes_zero and difference.mean < 0:
            yield (
                f"The control for routing is {control}: against it, these seeds speak for gqe at this scale; whether "
                "that is learned routing or merely more query weights, only the arm frozen tells."
            )
        elif difference.same_sign and difference.mean > 0:
            yield f"The control for routing is {control}: gqe lost to it, so routing did not pay here."
        elif difference.same_sign and difference.low is None:
            yield f"The control for routing is {control}: what was run points to routing, but without an interval."
        else:
            yield f"The control for routing is {control}: these runs don't establish that routing helps."
    half, frozen = (_between(rows, "gqe", control) for control in ("half", "frozen"))
    if half is not None:
        yield _outcome("gqe", "half", half)
    if frozen is not None:
        won = frozen.same_sign and frozen.mean < 0
        doubt = "" if won else " So a gain of gqe, where there is one, need not come from learned routing."
        yield _outcome("gqe", "frozen", frozen) + doubt


def _between(rows: dict[str, Row], arm: str, base: str) -> PairedDifference | None:
    return paired_difference(rows[arm].losses, rows[base].losses) if arm in rows and base in rows else None


def _certainty(comparison: Comparison, rows: dict[str, Row]) -> Iterator[str]:
    """How far seeds move the loss, beside how far arms do."""
    seeds = len(seeds_of(comparison))
    if seeds == 1:
        yield "One seed can't tell a difference between arms from luck."
    elif 0 < seeds < MIN_SEEDS_FOR_INTERVAL:
        yield f"{seeds} seeds are too few for a confidence interval."
    spreads = {arm: row.loss_spread for arm, row in rows.items() if row.loss_spread is not None}
    means = [row.loss_mean for row in rows.values() if row.loss_mean is not None]
    if not spreads or len(means) < 2:
        return
    arm = max(spreads, key=lambda name: spreads[name])
    between = max(means) - min(means)
    line = f"Changing nothing but the seed moves the loss by up to {spreads[arm]:.4f} ({arm}); "
    if spreads[arm] >= between:
        yield line + f"the arms' means differ by {between:.4f} at most. Go by paired differences, not means."
    else:
        yield line + f"the arms' means lie up to {between:.4f} apart, which says nothing of any one pair."


def _lowest(rows: dict[str, Row]) -> Iterator[str]:
    means = {arm: row.loss_mean for arm, row in rows.items() if row.loss_mean is not None}
    if len(means) < 2:
        return
    best = min(means, key=lambda arm: means[arm])
    seeds = {frozenset(row.losses) for row in rows.values() if row.losses}
    tail = "" if len(seeds) == 1 else ", but the arms' means are over different seeds"
    yield f"The lowest mean validation loss is that of {best} ({means[best]:.4f}){tail}."


def _speed(comparison: Comparison, rows: dict[str, Row]) -> Iterator[str]:
    if "gqe" not in rows:
        return
    yield from _training_speed(comparison)
    lengths = [length for length in prefill_lengths(comparison) if rows["gqe"].prefill.get(length)]
    for length in lengths[-1:]:
        yield _prefill_sentence(comparison, rows["gqe"], length)


def _training_speed(comparison: Comparison) -> Iterator[str]:
    """Seed by seed: runs of one seed follow each other, and a machine's speed drifts."""
    speeds = {
        arm: {run["seed"]: run["tokens_per_s"] for run in runs if run.get("tokens_per_s")}
        for arm, runs in runs_by_arm(comparison).items()
    }
    ours, dense = speeds.get("gqe", {}), speeds.get("dense", {})
    changes = [ours[seed] / dense[seed] - 1 for seed in sorted(ours.keys() & dense.keys())]
    if not changes:
        return
    listing = text.listed([f"{change:+.0%}" for change in changes])
    if max(abs(change) for change in changes) <= SAME_SPEED:
        yield f"In training, gqe runs about as fast as dense (tokens/s, seed by seed: {listing})."
    elif min(changes) > 0 or max(changes) < 0:
        yield f"In training, gqe runs {_pace(changes[0])} than dense on every seed (tokens/s: {listing})."
    else:
        yield f"In training, gqe runs faster than dense on some seeds and slower on others (tokens/s: {listing})."


def _pace(change: float) -> str:
    return "faster" if change > 0 else "slower"


def _prefill_sentence(comparison: Comparison, row: Row, length: int) -> str:
    speedup = row.prefill[length]
    assert speedup is not None
    at = f"Prefill of {text.length_name(length)} tokens: gqe"
    spread = f"repeats {speedup.low:.2f} to {speedup.high:.2f}"
    limit = ((comparison.get("prefill") or {}).get("limit") or {}).get("gqe")
    of_limit = f", limit by active heads {limit:.2f}" if limit else ""
    if speedup.clear_of_one:
        word = "faster" if speedup.low > 1 else "slower"
        line = f"{at} is {word} than dense in every repeat, {text.times(speedup.median)} its speed ({spread}{of_limit})"
    else:
        line = f"{at} is not reliably faster or slower than dense ({text.times(speedup.median)}, {spread}{of_limit})"
    control = prefill_speedup(comparison, "gqe", length, base="static")
    return line + (f"; against static it runs at {text.times(control.median)}." if control else ".")


def _sizes(rows: dict[str, Row]) -> Iterator[str]:
    for base in BASELINES:
        ours, theirs = (rows[arm].total_parameters if arm in rows else None for arm in ("gqe", base))
        if ours and theirs and abs(ours / theirs - 1) >= 0.005:
            change = ours / theirs - 1
            word = "more" if change > 0 else "fewer"
            yield f"gqe has {abs(change):.1%} {word} parameters than {base}: losses are not at equal size."


def _dead_experts(comparison: Comparison) -> Iterator[str]:
    found, threshold = [], 0.0
    for arm, runs in runs_by_arm(comparison).items():
        routings = [run["routing"] for run in runs if run.get("routing")]
        dead = [routing.get("dead") or 0 for routing in routings]
        if any(dead):
            experts = sum(len(group) for layer in routings[0].get("load") or () for group in layer)
            found.append(f"{arm} {text.listed([str(count) for count in dead])} of {experts}")
            threshold = max(threshold, *(routing.get("dead_below", 0.01) for routing in routings))
    if found:
        yield f"Dead experts, woken by less than {threshold:.0%} of tokens, seed by seed: {'; '.join(found)}."


def _scale(comparison: Comparison) -> Iterator[str]:
    runs = [run for group in runs_by_arm(comparison).values() for run in group]
    sizes = [run["parameters"]["total"] for run in runs if (run.get("parameters") or {}).get("total")]
    tokens = [run["train_tokens"] for run in runs if run.get("train_tokens")]
    if not sizes or not tokens:
        return
    size, seen = max(sizes), max(tokens)
    if size < TINY_PARAMETERS:
        yield (
            f"The models are tiny ({text.short(size)} parameters, {text.short(seen)} training tokens): nothing here "
            f"carries over to {PAPER} without being measured there."
        )
    if seen < TOKENS_PER_PARAMETER * size:
        yield (
            f"Training stopped at {seen / size:.1f} tokens a parameter, where loss still falls fast "
            f"(about {TOKENS_PER_PARAMETER} is usual): arms may change places with more."
        )


def _incomplete(comparison: Comparison) -> Iterator[str]:
    lines = missing_parts(comparison)
    if lines:
        yield f"The comparison is incomplete: {text.plural(len(lines), 'part')} missing, listed apart."
    runs = [run for group in runs_by_arm(comparison).values() for run in group]
    unequal = {run["train_tokens"] for run in runs if run.get("train_tokens")}
    if len(unequal) > 1:
        low, high = text.short(min(unequal)), text.short(max(unequal))
        yield f"Runs saw unequal numbers of tokens ({low} to {high}), so losses are not at equal training."
