"""Owns the verdict: sentences on what the numbers show and what they don't, each computed from the numbers.

Nothing here praises. A sentence that says `better` has a twin that says `worse`, and which one appears is decided by
the sign of the measured difference.
"""

from __future__ import annotations

from collections.abc import Iterator

from query_experts.common import formatting as text
from query_experts.study.report.machines import UNKNOWN, hardware
from query_experts.study.report.rows import (
    BASELINES,
    Comparison,
    Row,
    completed_runs,
    diverged,
    missing_parts,
    prefill_lengths,
    prefill_speedup,
    runs_by_arm,
    seeds_of,
    summary_rows,
)
from query_experts.study.statistics import MIN_SEEDS_FOR_INTERVAL, SLOWED, PairedDifference, paired_difference, sign

TINY_PARAMETERS = 50e6
TOKENS_PER_PARAMETER = 20  # about compute-optimal training (arXiv 2203.15556)
SAME_SPEED = 0.03
FEW_HELD_OUT = 20_000  # tokens
SEEN_AGAIN = 4  # epochs, up to which repeated text is about as good as new (arXiv 2305.16264)
BUSY = "runs follow one another, so other work on the machine shows in this"
CONTROLS = (*BASELINES, "half", "frozen")
PAPER = "the paper's 250M parameters and 30B tokens"


def verdict(comparison: Comparison) -> list[str]:
    """What the comparison shows and doesn't, most important first."""
    return [line for lines in verdict_by_topic(comparison).values() for line in lines]


def verdict_by_topic(comparison: Comparison) -> dict[str, list[str]]:
    """The verdict's sentences under the heading of what they are about; a topic without any is left out."""
    rows = {row.arm: row for row in summary_rows(comparison)}
    asked = len(seeds_of(comparison))
    topics = {
        "Loss": [
            *_against_baselines(rows, asked),
            *_routing_itself(rows, asked),
            *_lowest(rows),
            *_divergences(comparison),
        ],
        "How sure": [*_certainty(comparison, rows)],
        "Speed": [*_speed(comparison, rows)],
        "Routing": [*_dead_experts(comparison)],
        "What limits this": [
            *_left_out(comparison),
            *_sizes(rows),
            *_scale(comparison),
            *_text(comparison),
            *_incomplete(comparison),
        ],
    }
    return {topic: lines for topic, lines in topics.items() if lines}


def _studied(rows: dict[str, Row]) -> list[str]:
    """The arms that stand for the method, rather than for what it is measured against."""
    return [arm for arm in rows if arm not in CONTROLS]


def _against_baselines(rows: dict[str, Row], asked: int) -> Iterator[str]:
    if not _studied(rows):
        yield "No arm of the method has a run here, so this comparison says nothing about its quality."
    for arm in _studied(rows):
        for base in BASELINES:
            if base in rows:
                yield _outcome(rows, arm, base, asked)


def _outcome(rows: dict[str, Row], arm: str, base: str, asked: int) -> str:
    """One sentence on whether the arm has the lower loss, on how many seeds, by how much, and how sure that is."""
    difference, gone = _between(rows, arm, base), _diverged(rows, arm, base, asked)
    if difference is None:
        return f"{arm} can't be compared with {base}: {gone or 'no seed has a loss for both'}."
    parts = [_who_won(arm, base, difference, asked), _how_sure(difference), gone]
    return "; ".join(part for part in parts if part) + "."


def _between(rows: dict[str, Row], arm: str, base: str) -> PairedDifference | None:
    return paired_difference(rows[arm].losses, rows[base].losses) if arm in rows and base in rows else None


def _who_won(arm: str, base: str, difference: PairedDifference, asked: int) -> str:
    values = list(difference.differences.values())
    signs = [sign(value) for value in values]
    if len(values) == 1:
        end = f" by {abs(values[0]):.4f}" if signs[0] else ""
        where = "that both have" if asked > 1 else "of this comparison"
        return f"On the one seed {where}, {arm} {_verb(values[0])} {base}{end}"
    shown = f"{text.listed([text.signed(value) for value in values])}, mean {text.signed(difference.mean)}"
    if len(set(signs)) == 1:
        return f"{arm} {_verb(values[0])} {base} on {_every(len(values), asked)}: {shown}"
    return (
        f"{arm} against {base} has no consistent winner: lower loss on {signs.count(-1)} of {len(values)} seeds, "
        f"higher on {signs.count(1)} ({shown})"
    )


def _every(pairs: int, asked: int) -> str:
    if pairs < asked:
        return f"the {pairs} seeds that both have"
    return "both seeds" if pairs == 2 else f"every one of the {pairs} seeds"


def _verb(difference: float) -> str:
    return {-1: "is better than", 0: "has the same loss as", 1: "loses to"}[sign(difference)]


def _how_sure(difference: PairedDifference) -> str:
    if difference.low is None or not any(sign(value) for value in difference.differences.values()):
        return ""
    bracket = f"the 95% interval {text.interval(difference.low, difference.high)}"
    if difference.excludes_zero:
        return f"{bracket} excludes zero"
    return f"{bracket} includes zero, so chance alone may explain it"


def _diverged(rows: dict[str, Row], arm: str, base: str, asked: int) -> str:
    """Which seeds of the two arms diverged, or nothing."""
    gone = {name: rows[name].diverged for name in (arm, base) if rows[name].diverged}
    if not gone:
        return ""
    count = len({seed for seeds in gone.values() for seed in seeds})
    named = "; ".join(f"{name}, {text.seeds(seeds)}" for name, seeds in gone.items())
    return f"of {text.plural(asked, 'seed')}, {count} diverged ({named})"


def _divergences(comparison: Comparison) -> Iterator[str]:
    for arm, runs in runs_by_arm(comparison).items():
        gone = {run["seed"]: text.short(run["diverged_at_tokens"]) for run in runs if diverged(run)}
        if gone:
            after = f"after {text.listed(list(gone.values()))} tokens"
            yield f"{arm} diverged with {text.seeds(list(gone))}: {after} the loss was no longer a finite number."


def _routing_itself(rows: dict[str, Row], asked: int) -> Iterator[str]:
    """Whether routing, rather than anything else that gqe changes, earned the difference."""
    difference = _between(rows, "gqe", "static")
    if difference is not None:
        as_many = rows["gqe"].active_heads == rows["static"].active_heads
        control = "static, with as many active heads and no router" if as_many else "static, which has no router"
        yield f"The control for routing is {control}: {_of_routing(difference, asked)}."
    if _between(rows, "gqe", "half") is not None:
        yield _outcome(rows, "gqe", "half", asked)
    frozen = _between(rows, "gqe", "frozen")
    if frozen is not None:
        won = frozen.same_sign and frozen.mean < 0
        doubt = "" if won else " So a gain of gqe, where there is one, need not come from learned routing."
        yield _outcome(rows, "gqe", "frozen", asked) + doubt


def _of_routing(difference: PairedDifference, asked: int) -> str:
    """What the difference from static says of routing: no more than was measured."""
    if difference.excludes_zero and difference.mean < 0:
        return (
            "against it, these seeds speak for gqe at this scale; whether that is learned routing or merely more query "
            "weights, only the arm frozen tells"
        )
    if difference.excludes_zero:
        return "gqe lost to it, so routing did not pay here"
    if difference.low is None and difference.same_sign:
        pairs = len(difference.differences)
        on = "one seed" if pairs == 1 else _every(pairs, asked)
        return f"gqe has the {'lower' if difference.mean < 0 else 'higher'} loss on {on}, too few for an interval"
    return "these runs don't establish that routing helps"


def _certainty(comparison: Comparison, rows: dict[str, Row]) -> Iterator[str]:
    """How far seeds move the loss, beside how far arms do."""
    pairs = [len(difference.differences) for row in rows.values() for difference in row.versus.values() if difference]
    seeds = min(pairs, default=0)
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
        yield line + f"the arms' means differ by up to {between:.4f}, more than that. Still go by paired differences."


def _lowest(rows: dict[str, Row]) -> Iterator[str]:
    means = {arm: row.loss_mean for arm, row in rows.items() if row.loss_mean is not None}
    if len(means) < 2:
        return
    lowest = min(means.values())
    best = text.listed([arm for arm, mean in means.items() if not sign(mean - lowest)])
    seeds = {frozenset(row.losses) for row in rows.values() if row.losses}
    tail = "" if len(seeds) == 1 else ", but the arms' means are over different seeds"
    mean = "mean " if any(len(row.losses) > 1 for row in rows.values()) else ""
    yield f"The lowest {mean}validation loss is that of {best} ({lowest:.4f}){tail}."


def _speed(comparison: Comparison, rows: dict[str, Row]) -> Iterator[str]:
    machines = hardware(comparison)
    if UNKNOWN in machines:
        yield "It isn't recorded where every run was trained, so training speeds need not compare."
    elif len(machines) > 1:
        yield f"Runs were trained on different hardware ({'; '.join(machines)}), so training speeds don't compare."
    else:
        yield from (line for arm in _studied(rows) if (line := _training_speed(comparison, arm)))
    for arm in _studied(rows):
        timed = [length for length in prefill_lengths(comparison) if rows[arm].prefill[length]]
        if timed:
            yield _prefill_sentence(comparison, rows[arm], timed[-1])


def _training_speed(comparison: Comparison, arm: str) -> str:
    """Seed by seed: runs of one seed follow each other, and a machine's speed drifts. Empty where dense has no run."""
    speeds = {(run["arm"], run["seed"]): run["tokens_per_s"] for run in completed_runs(comparison)}
    ours, dense = ({seed: speed for (of, seed), speed in speeds.items() if of == name} for name in (arm, "dense"))
    changes = [ours[seed] / dense[seed] - 1 for seed in sorted(ours.keys() & dense.keys())]
    if not changes:
        return ""
    each = "tokens/s, seed by seed: " if len(changes) > 1 else "tokens/s: "
    listing = each + text.listed([f"{change:+.0%}".replace("-", text.MINUS) for change in changes])
    if max(abs(change) for change in changes) <= SAME_SPEED:
        return f"In training, {arm} ran about as fast as dense ({listing}); {BUSY}."
    if min(changes) > 0 or max(changes) < 0:
        on = " on every seed" if len(changes) > 1 else ""
        return f"In training, {arm} ran {_pace(changes[0])} than dense{on} ({listing}); {BUSY}."
    return f"In training, {arm} ran faster than dense on some seeds and slower on others ({listing}); {BUSY}."


def _pace(change: float) -> str:
    return "faster" if change > 0 else "slower"


def _prefill_sentence(comparison: Comparison, row: Row, length: int) -> str:
    speedup = row.prefill[length]
    assert speedup is not None
    at = f"Prefill of {text.length_name(length)} tokens: {row.arm}"
    limit = ((comparison.get("prefill") or {}).get("limit") or {}).get(row.arm)
    details = [f"repeats {speedup.low:.2f} to {speedup.high:.2f}"] if speedup.repeats > 1 else ["one repeat"]
    details += [f"limit by active heads {limit:.2f}"] if limit else []
    beside = ", ".join(details)
    if speedup.disturbed:
        return (
            f"{at} ran at {text.times(speedup.median)} the speed of dense ({beside}), but a repeat took over "
            f"{SLOWED:g} times as long as another of the same arm: other work was running. The same command times it "
            "again."
        )
    if speedup.clear_of_one:
        word = "faster" if speedup.low > 1 else "slower"
        when = " in every repeat" if speedup.repeats > 1 else ""
        line = f"{at} is {word} than dense{when}, {text.times(speedup.median)} its speed ({beside})"
    else:
        line = f"{at} is not reliably faster or slower than dense ({text.times(speedup.median)}, {beside})"
    control = prefill_speedup(comparison, row.arm, length, base="static")
    return line + (f"; against static it runs at {text.times(control.median)}." if control else ".")


def _left_out(comparison: Comparison) -> Iterator[str]:
    """Baselines that nobody asked for."""
    asked = {*((comparison.get("settings") or {}).get("arms") or ()), *runs_by_arm(comparison)}
    for base in BASELINES:
        if base not in asked:
            reason = "the control without a router" if base == "static" else "the model with all heads on"
            yield f"{base}, {reason}, was not asked for, so nothing is said against it."


def _sizes(rows: dict[str, Row]) -> Iterator[str]:
    for arm in _studied(rows):
        for base in BASELINES:
            change = rows[arm].total_parameters / rows[base].total_parameters - 1 if base in rows else 0.0
            if abs(change) >= 0.005:
                word = "more" if change > 0 else "fewer"
                yield f"{arm} has {abs(change):.1%} {word} parameters than {base}: losses are not at equal size."


def _dead_experts(comparison: Comparison) -> Iterator[str]:
    found, threshold = [], 0.0
    for arm, runs in runs_by_arm(comparison).items():
        routings = [run["routing"] for run in runs if run["routing"]]
        dead = [routing["dead"] for routing in routings]
        if any(dead):
            experts = sum(len(group) for layer in routings[0]["load"] for group in layer)
            found.append(f"{arm} {text.listed([str(count) for count in dead])} of {experts}")
            threshold = routings[0]["dead_below"]
    if found:
        yield f"Dead experts, woken by less than {threshold:.0%} of tokens, seed by seed: {'; '.join(found)}."


def _scale(comparison: Comparison) -> Iterator[str]:
    runs = completed_runs(comparison)
    if not runs:
        return
    size, seen = max(run["parameters"]["total"] for run in runs), max(run["train_tokens"] for run in runs)
    if size < TINY_PARAMETERS:
        yield (
            f"The models are tiny ({text.short(size)} parameters, {text.short(seen)} training tokens): nothing here "
            f"carries over to {PAPER} without being measured there."
        )
    if seen < 0.9 * TOKENS_PER_PARAMETER * size:
        yield (
            f"Training stopped at {seen / size:.2g} tokens a parameter, where loss still falls fast "
            f"(about {TOKENS_PER_PARAMETER} is usual): arms may change places with more."
        )


def _text(comparison: Comparison) -> Iterator[str]:
    """How far the text carries: little of it held out, or much of it seen again."""
    data = comparison.get("data") or {}
    if not completed_runs(comparison):
        return
    held_out, epochs = data.get("validation_tokens_used"), data.get("epochs")
    if held_out and held_out < FEW_HELD_OUT:
        yield (
            f"The validation loss is taken over {held_out:,} tokens of held-out text: which text that is may move it "
            "more than the arms do."
        )
    if epochs and epochs > SEEN_AGAIN:
        times = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.1f}"
        yield f"The training text was seen {times} times over: past a few times, models learn it by heart."


def _incomplete(comparison: Comparison) -> Iterator[str]:
    lines = missing_parts(comparison)
    if lines:
        yield f"The comparison is incomplete: {text.plural(len(lines), 'part')} missing, listed apart."
    unequal = {run["train_tokens"] for run in completed_runs(comparison)}
    if len(unequal) > 1:
        low, high = text.short(min(unequal)), text.short(max(unequal))
        yield f"Runs saw unequal numbers of tokens ({low} to {high}), so losses are not at equal training."
