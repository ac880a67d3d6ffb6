"""Owns what the report knows about each arm: runs grouped by arm, means and paired differences over seeds, speedups.

Everything shown (terminal, page, verdict) is computed here once from `comparison`, and what is missing is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from query_experts.common.formatting import DIVERGED, MISSING, length_name, listed, seeds
from query_experts.model.arms import in_order
from query_experts.study.statistics import PairedDifference, disturbed, paired_difference

Comparison = Mapping[str, Any]
Run = Mapping[str, Any]

BASELINES = ("dense", "static")


@dataclass(frozen=True)
class Speedup:
    """How many times faster than a baseline, over repeats timed in turn."""

    median: float
    low: float
    high: float
    repeats: int
    disturbed: bool

    @property
    def clear_of_one(self) -> bool:
        """Whether every repeat falls on the same side of equal speed."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Row:
    """One arm of the comparison. None, or an empty mapping, stands for what was not measured."""

    arm: str
    total_parameters: int
    active_parameters: int
    active_heads: str
    flops_per_token: float
    kv_bytes_per_token: float
    tokens_per_s: float | None
    losses: dict[int, float]
    diverged: list[int]
    versus: dict[str, PairedDifference | None]
    prefill: dict[int, Speedup | None]
    prefill_seconds: dict[int, float | None]

    @property
    def loss_mean(self) -> float | None:
        """Validation loss, mean over seeds."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def loss_spread(self) -> float | None:
        """Highest less lowest validation loss over seeds, from two seeds on."""
        return max(self.losses.values()) - min(self.losses.values()) if len(self.losses) > 1 else None


def runs_by_arm(comparison: Comparison) -> dict[str, list[Run]]:
    """The runs of every arm that has any, in the study's order, sorted by seed."""
    runs = sorted(comparison.get("runs") or (), key=lambda run: run["seed"])
    arms = in_order(run["arm"] for run in runs)
    return {arm: [run for run in runs if run["arm"] == arm] for arm in arms}


def diverged(run: Run) -> bool:
    """Whether the run ended because its loss was no longer a finite number."""
    return run.get("diverged_at_tokens") is not None


def completed_runs(comparison: Comparison) -> list[Run]:
    """All runs but those that diverged."""
    return [run for runs in runs_by_arm(comparison).values() for run in runs if not diverged(run)]


def summary_rows(comparison: Comparison) -> list[Row]:
    """One row for each arm that has a run, in the study's order."""
    by_arm = runs_by_arm(comparison)
    losses = {
        arm: {run["seed"]: run["validation_loss"] for run in runs if not diverged(run)} for arm, runs in by_arm.items()
    }
    return [_row(comparison, arm, runs, losses) for arm, runs in by_arm.items()]


def _row(comparison: Comparison, arm: str, runs: list[Run], losses: Mapping[str, dict[int, float]]) -> Row:
    first, own, lengths = runs[0], losses[arm], prefill_lengths(comparison)
    speeds = [run["tokens_per_s"] for run in runs if not diverged(run)]
    return Row(
        arm=arm,
        total_parameters=first["parameters"]["total"],
        active_parameters=first["parameters"]["active"],
        active_heads=f"{first['active_attention_heads']:g}/{first['dense_attention_heads']:g}",
        flops_per_token=first["flops_per_token"],
        kv_bytes_per_token=first["kv_bytes_per_token"],
        tokens_per_s=statistics.median(speeds) if speeds else None,
        losses=own,
        diverged=[run["seed"] for run in runs if diverged(run)],
        versus={base: None if base == arm else paired_difference(own, losses.get(base, {})) for base in BASELINES},
        prefill={length: prefill_speedup(comparison, arm, length) for length in lengths},
        prefill_seconds={length: prefill_median(comparison, arm, length) for length in lengths},
    )


def prefill_lengths(comparison: Comparison) -> list[int]:
    """The sequence lengths at which prefill was timed, or none."""
    return list((comparison.get("prefill") or {}).get("lengths") or ())


def prefill_speedup(comparison: Comparison, arm: str, length: int, base: str = "dense") -> Speedup | None:
    """Speed of `arm` over `base` at one length: ratios of repeats that ran side by side, or None without both."""
    theirs, ours = (_prefill_repeats(comparison, name, length) for name in (base, arm))
    ratios = [other / own for other, own in zip(theirs, ours, strict=False)]
    if not ratios:
        return None
    return Speedup(
        statistics.median(ratios), min(ratios), max(ratios), len(ratios), disturbed(theirs) or disturbed(ours)
    )


def prefill_median(comparison: Comparison, arm: str, length: int) -> float | None:
    """Median seconds of an arm at one length, or None where it was not timed."""
    repeats = _prefill_repeats(comparison, arm, length)
    return statistics.median(repeats) if repeats else None


def _prefill_repeats(comparison: Comparison, arm: str, length: int) -> list[float]:
    """Seconds of every repeat; none where the arm, or yet the length, was not timed."""
    seconds = comparison["prefill"]["seconds"].get(arm) or []
    position = prefill_lengths(comparison).index(length)
    return seconds[position] if position < len(seconds) else []


def seeds_of(comparison: Comparison) -> list[int]:
    """Every seed that was asked for or run."""
    asked = (comparison.get("settings") or {}).get("seeds") or ()
    return sorted({*asked, *(run["seed"] for run in comparison.get("runs") or ())})


def by_seed(
    values: Mapping[int, float], gone: Collection[int], asked: list[int], write: Callable[[float], str]
) -> list[str]:
    """A value for each seed that was asked for, or what stands for it: those in `gone` diverged, others are missing."""
    absent = {seed: DIVERGED if seed in gone else MISSING for seed in asked}
    return [write(values[seed]) if seed in values else absent[seed] for seed in asked]


def missing_parts(comparison: Comparison) -> list[str]:
    """What a complete comparison would hold and this one doesn't, one sentence each."""
    by_arm = runs_by_arm(comparison)
    arms = in_order([*((comparison.get("settings") or {}).get("arms") or ()), *by_arm])
    lines = []
    for arm in arms:
        runs = by_arm.get(arm, [])
        absent = sorted(set(seeds_of(comparison)) - {run["seed"] for run in runs})
        if not runs:
            lines.append(f"No run of {arm}.")
        elif absent:
            lines.append(f"No run of {arm} with {seeds(absent)}.")
    finished = {run["arm"] for run in completed_runs(comparison)}
    return lines + _missing_prefill(comparison, [arm for arm in arms if arm in finished])


def _missing_prefill(comparison: Comparison, arms: list[str]) -> list[str]:
    lengths = prefill_lengths(comparison)
    if not lengths:
        return ["Prefill was not timed."]
    if all(prefill_speedup(comparison, "dense", length) is None for length in lengths):
        return ["Prefill was not timed for dense, so there is no speed against it."]
    untimed: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        gone = [length_name(length) for length in lengths if prefill_speedup(comparison, arm, length) is None]
        if gone:
            untimed.setdefault(tuple(gone), []).append(arm)
    return [
        f"Prefill of {listed(names)} was not timed"
        + (f" at {listed(gone)} tokens." if len(gone) < len(lengths) else ".")
        for gone, names in untimed.items()
    ]
