"""Owns the three tables (quality, cost, prefill) as plain text cells, so that terminal and page show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from query_experts.study import report_text as text
from query_experts.study.report_rows import BASELINES, Comparison, Row, Speedup, prefill_lengths, summary_rows
from query_experts.study.statistics import PairedDifference


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
    found = [_quality([row for row in rows if row.losses]), _cost(rows), _prefill(comparison, rows)]
    return [table for table in found if table.body]


def _quality(rows: list[Row]) -> Table:
    return Table(
        title="Quality",
        note="Language-model loss on held-out text: lower is better. Differences are paired: same seed, same tokens, "
        "in the order of the seeds; negative means lower loss than the baseline. Brackets: 95% interval of the mean.",
        head=["arm", "validation loss", "lowest to highest seed", *(f"difference from {base}" for base in BASELINES)],
        body=[
            [row.arm, text.fixed(row.loss_mean), _spread(row), *(_difference(row.versus[base]) for base in BASELINES)]
            for row in rows
        ],
    )


def _spread(row: Row) -> str:
    if row.loss_spread is None:
        return text.MISSING
    return f"{text.fixed(min(row.losses.values()))} to {text.fixed(max(row.losses.values()))}"


def _difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return text.MISSING
    seeds = " ".join(text.signed(value) for value in difference.differences.values())
    if len(difference.differences) == 1:
        return seeds
    return f"{seeds}\nmean {text.signed(difference.mean)} {text.interval(difference.low, difference.high)}".rstrip()


def _cost(rows: list[Row]) -> Table:
    return Table(
        title="Cost",
        note="Active: used by one token. FLOPs: what a token needs in a forward pass at the training "
        "length, without queries that are computed and discarded. KV bytes: cache a token. "
        "Training speed is the median over seeds.",
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
    timed = [row for row in rows if any(row.prefill.values())]
    repeats = prefill.get("repeats")
    return Table(
        title="Prefill speed against dense",
        note="Times as fast as dense: median"
        + (f" of {text.plural(repeats, 'repeat')}" if repeats else "")
        + ", below it the slowest to the fastest. Limit: the ratio of attention heads, N/(kG+1) for gqe, which "
        "attention alone could reach.",
        head=["arm", *(f"{text.length_name(length)} tokens" for length in lengths), "limit"],
        body=[
            [row.arm, *(_speed(row.prefill[length]) for length in lengths), text.times(limit.get(row.arm))]
            for row in timed
        ],
    )


def _speed(speedup: Speedup | None) -> str:
    if speedup is None:
        return text.MISSING
    if speedup.low == speedup.high:
        return text.times(speedup.median)
    return f"{text.times(speedup.median)}\n{speedup.low:.2f} to {speedup.high:.2f}"
