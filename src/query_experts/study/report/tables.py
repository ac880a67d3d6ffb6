"""Owns the three tables (quality, cost, prefill) as plain text cells, so that terminal and page show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from query_experts.common import formatting as text
from query_experts.study.report.machines import UNKNOWN, hardware
from query_experts.study.report.rows import BASELINES, Comparison, Row, by_seed, prefill_lengths, seeds_of, summary_rows
from query_experts.study.statistics import SLOWED


@dataclass(frozen=True)
class Table:
    """A table of strings. A cell may hold several lines; the first cell of a row names the arm."""

    title: str
    note: str
    head: list[str]
    body: list[list[str]]


def tables(comparison: Comparison) -> list[Table]:
    """Quality and cost, and prefill where it was timed."""
    rows = summary_rows(comparison)
    found = [_quality(comparison, rows), _cost(comparison, rows), _prefill(comparison, rows)]
    return [table for table in found if table.body]


def _quality(comparison: Comparison, rows: list[Row]) -> Table:
    asked, diverged = seeds_of(comparison), {row.arm: row.diverged for row in rows}
    return Table(
        title="Quality",
        note="Language-model loss on held-out text: lower is better. Last in a cell: each seed, in order. Differences "
        "are paired, same seed and same tokens; negative means lower loss than the baseline. Brackets: 95% interval "
        "of the mean.",
        head=["arm", "validation loss", *(f"difference from {base}" for base in BASELINES)],
        body=[
            [
                row.arm,
                _losses(row, asked),
                *(_differences(row, base, asked, [*row.diverged, *diverged.get(base, ())]) for base in BASELINES),
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


def _differences(row: Row, base: str, asked: list[int], gone: list[int]) -> str:
    """The mean, its interval, each seed: a line each."""
    difference = row.versus[base]
    if difference is None:
        return text.MISSING
    mean = [f"mean {text.signed(difference.mean)}"] if len(difference.differences) > 1 else []
    bracket = [text.interval(difference.low, difference.high)] if difference.low is not None else []
    return "\n".join([*mean, *bracket, " ".join(by_seed(difference.differences, gone, asked, text.signed))])


def _cost(comparison: Comparison, rows: list[Row]) -> Table:
    speed = "Training speed is the median over seeds"
    machines = hardware(comparison)
    if UNKNOWN in machines:
        speed += "; it isn't recorded where every run was trained"
    elif len(machines) > 1:
        speed += "; runs were trained on different hardware, so their speeds don't compare"
    return Table(
        title="Cost",
        note="Active: used by one token; of dense's query heads, the shared head counted among them. FLOPs: what a "
        "token needs in a forward pass at the training length, without queries that are computed and discarded. KV "
        f"bytes: cache a token. {speed}.",
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
                text.whole(row.tokens_per_s),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _prefill(comparison: Comparison, rows: list[Row]) -> Table:
    prefill: Mapping[str, Any] = comparison.get("prefill") or {}
    lengths, limit = prefill_lengths(comparison), prefill.get("limit") or {}
    timed = [row for row in rows if any(row.prefill_seconds.values())]
    repeats = prefill.get("repeats") or 1
    spread = f"median of {repeats} repeats, below it the slowest to the fastest, then" if repeats > 1 else "below it"
    disturbed = any(speedup and speedup.disturbed for row in rows for speedup in row.prefill.values())
    return Table(
        title="Prefill speed against dense",
        note=f"Times as fast as dense: {spread} the arm's own {'median ' * (repeats > 1)}time. "
        + "Ratios are taken within a repeat, so where a machine's speed varies, the median is not that of the times. "
        * (repeats > 1)
        + f"Disturbed: a repeat took over {SLOWED:g} times as long as another of the same arm. " * disturbed
        + "Limit: the ratio of attention heads, N/(kG+1) for gqe, which attention alone could reach.",
        head=["arm", *(f"{text.length_name(length)} tokens" for length in lengths), "limit"],
        body=[[row.arm, *(_speed(row, length) for length in lengths), text.times(limit.get(row.arm))] for row in timed],
    )


def _speed(row: Row, length: int) -> str:
    """The speed against dense, its range, and the time: a line each."""
    speedup, lines = row.prefill[length], [text.duration(row.prefill_seconds[length])]
    if speedup is not None and speedup.low < speedup.high:
        lines.insert(0, f"{speedup.low:.2f} to {speedup.high:.2f}" + (" (disturbed)" if speedup.disturbed else ""))
    if speedup is not None:
        lines.insert(0, text.times(speedup.median))
    return "\n".join(lines)
