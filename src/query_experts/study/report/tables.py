"""Makes the tables (findings, quality, cost, prefill, load) as text, so that terminal and page show the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from query_experts.common import formatting as text
from query_experts.study.report.findings import CONTROLS, Certainty, Finding, findings
from query_experts.study.report.machines import UNKNOWN, hardware
from query_experts.study.report.rows import (
    BASELINES,
    Row,
    TrainingSpeed,
    by_seed,
    prefill_lengths,
    runs_by_arm,
    seeds_of,
    summary_rows,
)
from query_experts.study.report.table import Table
from query_experts.study.results import Comparison, RunResult
from query_experts.study.statistics import SLOWED, sign

CERTAINTIES: dict[Certainty, str] = {
    "excludes zero": "interval excludes zero",
    "includes zero": "interval includes zero: chance may explain it",
    "too few seeds": "too few seeds for an interval",
    "one seed": "one seed: luck may explain it",
}
CONTROL_NOTES = {
    "static": "static has no router. A lower loss than static may come from routing or from more query weights.",
    "half": "half has fewer query heads and as many parameters as gqe.",
    "frozen": "frozen has a router that never trains. Only a lower loss than frozen is evidence of learned routing.",
}


def findings_table(comparison: Comparison) -> Table:
    """A row for each finding."""
    found = findings(comparison)
    notes = [note for control, note in CONTROL_NOTES.items() if control in {each.baseline for each in found}]
    return Table(
        title="Findings",
        note="Validation loss of an arm, in nats a token, minus that of its baseline with the same seed and the same "
        "tokens: the mean over seeds, its 95% interval, and the number of seeds on which it is lower. "
        f"{' '.join(notes)}",
        head=["arm", "baseline", "loss", "difference", "lower on", "certainty"],
        body=[
            [each.arm, each.baseline, _verdict(each), _difference(each), _lower_on(each), _certainty(each)]
            for each in found
        ],
        left=(0, 1, 5),
    )


def _verdict(finding: Finding) -> str:
    return text.MISSING if finding.verdict == "not comparable" else finding.verdict


def _difference(finding: Finding) -> str:
    bracket = text.interval(finding.low, finding.high)
    return "\n".join([text.signed(finding.mean), *([bracket] if bracket else [])])


def _lower_on(finding: Finding) -> str:
    """On how many seeds, of those that have both losses."""
    if not finding.seeds:
        return text.MISSING
    paired = f"{finding.lower_on} of {finding.seeds}"
    return paired if finding.seeds == finding.asked else f"{paired}\n({finding.asked} asked)"


def _certainty(finding: Finding) -> str:
    lines = [CERTAINTIES[finding.certainty]] if finding.certainty is not None else []
    if finding.verdict == "same":
        lines.append("no difference at four digits")
    if finding.diverged:
        count = len({seed for seeds in finding.diverged.values() for seed in seeds})
        named = "; ".join(f"{arm}, {text.name_seeds(seeds)}" for arm, seeds in finding.diverged.items())
        lines.append(f"of {text.plural(finding.asked, 'seed')}, {count} diverged ({named})")
    elif not finding.seeds:
        lines.append("no seed has both losses")
    return "\n".join(lines)


def tables(comparison: Comparison) -> list[Table]:
    """Quality and cost, and prefill and load where they were measured."""
    rows = summary_rows(comparison)
    found = [_quality(comparison, rows), _cost(comparison, rows), _prefill(comparison, rows), _load(comparison)]
    return [table for table in found if table.body]


def _quality(comparison: Comparison, rows: list[Row]) -> Table:
    asked, diverged = seeds_of(comparison), {row.arm: row.diverged for row in rows}
    notes = [
        "Language-model loss on held-out text in nats a token; lower is better. The last line of a cell has each seed "
        "in order. Differences are paired by seed. Brackets: 95% interval of the mean.",
        _lowest(rows), _spread(rows), _divergences(comparison),
    ]  # fmt: skip
    return Table(
        title="Quality",
        note=" ".join(note for note in notes if note),
        head=["arm", "validation loss", *(f"difference from {base}" for base in BASELINES)],
        body=[
            [
                row.arm,
                _losses(row, asked),
                *(_differences(row, base, asked, {*row.diverged, *diverged.get(base, ())}) for base in BASELINES),
            ]
            for row in rows
        ],
    )


def _losses(row: Row, asked: list[int]) -> str:
    """The mean, and below it each seed."""
    if not row.losses:
        return text.DIVERGED
    mean = [f"mean {text.fixed(row.loss_mean)}"] if len(row.losses) > 1 else []
    return "\n".join([*mean, " ".join(by_seed(row.losses, row.diverged, asked, text.fixed))])


def _differences(row: Row, base: str, asked: list[int], diverged: Collection[int]) -> str:
    """The mean, its interval and each seed, a line each."""
    difference = row.versus[base]
    if difference is None:
        return text.MISSING
    mean = [f"mean {text.signed(difference.mean)}"] if len(difference.differences) > 1 else []
    bracket = [text.interval(difference.low, difference.high)] if difference.low is not None else []
    return "\n".join([*mean, *bracket, " ".join(by_seed(difference.differences, diverged, asked, text.signed))])


def _lowest(rows: list[Row]) -> str:
    """The arms with the lowest mean loss."""
    means = {row.arm: row.loss_mean for row in rows if row.loss_mean is not None}
    if len(means) < 2:
        return ""
    lowest = min(means.values())
    best = text.join_words([arm for arm, mean in means.items() if not sign(mean - lowest)])
    several = any(len(row.losses) > 1 for row in rows)
    unequal = len({frozenset(row.losses) for row in rows if row.losses}) > 1
    return f"Lowest{' mean' * several}: {best} ({lowest:.4f}){', over unequal seeds' * unequal}."


def _spread(rows: list[Row]) -> str:
    """How much the loss changes with the seed, and how much with the arm."""
    spreads = {row.arm: row.loss_spread for row in rows if row.loss_spread is not None}
    means = [row.loss_mean for row in rows if row.loss_mean is not None]
    if not spreads or len(means) < 2:
        return ""
    arm = max(spreads, key=lambda name: spreads[name])
    between = max(means) - min(means)
    relation = "no more than" if spreads[arm] >= between else "more than"
    return (
        f"The arms' means differ by up to {between:.4f}, {relation} the seeds of one arm do ({spreads[arm]:.4f}, "
        f"{arm}): compare paired differences, not means."
    )


def _divergences(comparison: Comparison) -> str:
    sentences = []
    for arm, runs in runs_by_arm(comparison).items():
        after = {run.seed: text.short(run.diverged_at_tokens) for run in runs if run.diverged}
        if after:
            tokens = text.join_words(list(after.values()))
            sentences.append(
                f"{arm} diverged with {text.name_seeds(list(after))}: its loss was no finite number after {tokens} "
                "tokens."
            )
    return " ".join(sentences)


def _cost(comparison: Comparison, rows: list[Row]) -> Table:
    machines = hardware(comparison)
    comparable = UNKNOWN not in machines and len(machines) < 2
    return Table(
        title="Cost",
        note=_cost_note(rows, machines),
        head=[
            "arm", "total params", "active params", "active heads", "active FLOPs a token", "KV bytes a token",
            "training tokens/s",
        ],
        body=[
            [
                row.arm,
                text.short(row.total_parameters),
                text.short(row.active_parameters),
                row.active_heads,
                text.short(row.flops_per_token),
                text.whole(row.kv_bytes_per_token),
                _tokens_per_s(row, comparable),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _cost_note(rows: list[Row], machines: list[str]) -> str:
    return " ".join(
        [
            "Active: used by one token; active heads include the shared head. FLOPs: of a forward pass at the training "
            "length, without queries that are computed and discarded. KV bytes: cache of one token.",
            *_unequal_sizes(rows),
            _speed_note(machines),
        ]
    )


def _unequal_sizes(rows: list[Row]) -> list[str]:
    """A sentence for each studied arm whose losses are not at the size of a baseline."""
    return [
        f"{row.arm} has {abs(change):.1%} {'more' if change > 0 else 'fewer'} parameters than {base}: losses are not "
        "at equal size."
        for row in rows
        if row.arm not in CONTROLS
        for base, change in row.unequal_size.items()
    ]


def _speed_note(machines: list[str]) -> str:
    if UNKNOWN in machines:
        return (
            "Training speed: median over seeds; it isn't recorded where every run was trained, so speeds need not "
            "compare."
        )
    if len(machines) > 1:
        return (
            f"Training speed: median over seeds; runs were trained on different hardware ({'; '.join(machines)}), so "
            "speeds don't compare."
        )
    return (
        "Training speed: median over seeds, then relative to dense, seed by seed. Other work on the machine affects it."
    )


def _tokens_per_s(row: Row, comparable: bool) -> str:
    """The median over seeds; if comparable, its relation to dense, and below that each seed."""
    lines = [text.whole(row.tokens_per_s)]
    if comparable and row.training_speed is not None:
        lines += [_pace(row.training_speed), " ".join(map(_percent, row.training_speed.changes.values()))]
    return "\n".join(lines)


def _pace(speed: TrainingSpeed) -> str:
    return "as dense" if speed.outcome == "same" else speed.outcome


def _percent(change: float) -> str:
    return f"{change:+.0%}".replace("-", text.MINUS)


def _prefill(comparison: Comparison, rows: list[Row]) -> Table:
    lengths = prefill_lengths(comparison)
    limit = comparison.prefill.limit if comparison.prefill is not None else {}
    repeats = comparison.prefill.repeats if comparison.prefill is not None else 1
    longest = [length for length in lengths if any(row.prefill[length] for row in rows if row.arm != "dense")][-1:]
    return Table(
        title="Prefill speed relative to dense",
        note=_prefill_note(repeats, any(speed and speed.disturbed for row in rows for speed in row.prefill.values())),
        head=[
            "arm",
            *(f"{text.length_name(length)} tokens" for length in lengths),
            "limit",
            *(f"at {text.length_name(length)} tokens" for length in longest),
        ],
        body=[
            [
                row.arm,
                *(_speed(row, length) for length in lengths),
                text.times(limit.get(row.arm)),
                *(_outcome(row, length) for length in longest),
            ]
            for row in rows
            if any(row.prefill_seconds.values())
        ],
    )


def _prefill_note(repeats: int, disturbed: bool) -> str:
    sentences = ["Speed relative to dense, then the arm's own time."]
    if repeats > 1:
        sentences = [
            f"Speed relative to dense, the median of {repeats} repeats; then the range of the repeats; then the arm's "
            "own median time. Ratios are taken within a repeat, so the median is not the ratio of the times.",
            "Faster or slower: in every repeat; otherwise unclear.",
        ]
    if disturbed:
        sentences.append(
            f"Disturbed: a repeat took over {SLOWED:g} times as long as another of the same arm, because of other work "
            "on the machine. The same command times it again."
        )
    limit = "Limit: the ratio of active heads, N/(kG+1) for gqe, which attention alone could reach."
    return " ".join([*sentences, limit])


def _speed(row: Row, length: int) -> str:
    """The speed relative to dense, its range, and the time: a line each."""
    speedup, lines = row.prefill[length], [text.duration(row.prefill_seconds[length])]
    if speedup is not None and speedup.low < speedup.high:
        lines.insert(0, f"{speedup.low:.2f} to {speedup.high:.2f}" + (" (disturbed)" if speedup.disturbed else ""))
    if speedup is not None:
        lines.insert(0, text.times(speedup.median))
    return "\n".join(lines)


def _outcome(row: Row, length: int) -> str:
    """Whether the arm is faster than dense, and its speed relative to static."""
    speed, over_static = row.prefill[length], row.prefill_over_static[length]
    if row.arm == "dense" or speed is None:
        return text.MISSING
    if row.arm == "static" or over_static is None:
        return speed.outcome
    return f"{speed.outcome}\n{text.times(over_static.median)} static"


def _load(comparison: Comparison) -> Table:
    routed = {arm: [run for run in runs if run.routing is not None] for arm, runs in runs_by_arm(comparison).items()}
    return Table(
        title="Load",
        note=f"Dead: selected by less than {_dead_below(routed):.0%} of held-out tokens. Entropy: of the router, mean "
        "over layers and groups; 1 is undecided, 0 is certain. Each seed in order.",
        head=["arm", "experts", "dead experts", "router entropy"],
        body=[_load_cells(arm, runs) for arm, runs in routed.items() if runs],
    )


def _dead_below(routed: Mapping[str, list[RunResult]]) -> float:
    return max((run.routing.dead_below for runs in routed.values() for run in runs if run.routing), default=0.0)


def _load_cells(arm: str, runs: list[RunResult]) -> list[str]:
    loads = [run.routing for run in runs if run.routing is not None]
    dead, entropy = [str(load.dead) for load in loads], [f"{load.mean_entropy:.2f}" for load in loads]
    return [arm, str(loads[0].num_experts), " ".join(dead), " ".join(entropy)]
