"""Owns what the report knows about each arm: runs grouped by arm, means and paired differences over seeds, speedups.

Everything shown (terminal, page, verdict) is computed here once from `comparison`, and what is missing is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from query_experts.study.report_text import MISSING, in_order, length_name, listed
from query_experts.study.statistics import PairedDifference, paired_difference

Comparison = Mapping[str, Any]
Run = Mapping[str, Any]

BASELINES = ("dense", "static")


@dataclass(frozen=True)
class Speedup:
    """How many times faster than a baseline, over repeats timed in turn."""

    median: float
    low: float
    high: float

    @property
    def clear_of_one(self) -> bool:
        """Whether every repeat falls on the same side of equal speed."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Row:
    """One arm of the comparison. None, or an empty mapping, stands for what was not measured."""

    arm: str
    total_parameters: int | None
    active_parameters: int | None
    active_heads: str
    flops_per_token: float | None
    kv_bytes_per_token: float | None
    tokens_per_s: float | None
    losses: dict[int, float]
    versus: dict[str, PairedDifference | None]
    prefill: dict[int, Speedup | None]

    @property
    def loss_mean(self) -> float | None:
        """Validation loss, mean over seeds."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def loss_spread(self) -> float | None:
        """Highest less lowest validation loss over seeds, from two seeds on."""
        return max(self.losses.values()) - min(self.losses.values()) if len(self.losses) > 1 else None


def runs_by_arm(comparison: Comparison) -> dict[str, list[Run]]:
    """The runs of every arm that has any, in the study's order, sorted by seed; a repeated run replaces the earlier."""
    found: dict[str, dict[int, Run]] = {}
    for run in comparison.get("runs") or ():
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return {arm: [found[arm][seed] for seed in sorted(found[arm])] for arm in in_order(found)}


def finite_losses(runs: list[Run]) -> dict[int, float]:
    """Validation loss by seed, without runs that have none or that diverged."""
    losses = {run["seed"]: run.get("validation_loss") for run in runs}
    return {seed: float(loss) for seed, loss in losses.items() if loss is not None and math.isfinite(loss)}


def summary_rows(comparison: Comparison) -> list[Row]:
    """One row for each arm that has a run or a prefill timing, in the study's order."""
    by_arm = runs_by_arm(comparison)
    losses = {arm: finite_losses(runs) for arm, runs in by_arm.items()}
    timed = (comparison.get("prefill") or {}).get("seconds") or {}
    return [_row(comparison, arm, by_arm.get(arm, []), losses) for arm in in_order([*by_arm, *timed])]


def _row(comparison: Comparison, arm: str, runs: list[Run], losses: Mapping[str, dict[int, float]]) -> Row:
    first: Run = runs[0] if runs else {}
    parameters = first.get("parameters") or {}
    active, dense = first.get("active_attention_heads"), first.get("dense_attention_heads")
    speeds = [run["tokens_per_s"] for run in runs if run.get("tokens_per_s")]
    own = losses.get(arm, {})
    return Row(
        arm=arm,
        total_parameters=parameters.get("total"),
        active_parameters=parameters.get("active"),
        active_heads=MISSING if active is None or dense is None else f"{active:g}/{dense:g}",
        flops_per_token=first.get("flops_per_token"),
        kv_bytes_per_token=first.get("kv_bytes_per_token"),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        losses=own,
        versus={base: None if base == arm else paired_difference(own, losses.get(base, {})) for base in BASELINES},
        prefill={length: prefill_speedup(comparison, arm, length) for length in prefill_lengths(comparison)},
    )


def prefill_lengths(comparison: Comparison) -> list[int]:
    """The sequence lengths at which prefill was timed, or none."""
    return list((comparison.get("prefill") or {}).get("lengths") or ())


def prefill_speedup(comparison: Comparison, arm: str, length: int, base: str = "dense") -> Speedup | None:
    """Speed of `arm` over `base` at one length: ratios of repeats that ran side by side, or None without both."""
    seconds = (comparison.get("prefill") or {}).get("seconds") or {}
    position = prefill_lengths(comparison).index(length)
    ours, theirs = (seconds.get(name) or [] for name in (arm, base))
    if position >= min(len(ours), len(theirs)):
        return None
    pairs = zip(theirs[position] or (), ours[position] or (), strict=False)
    ratios = [other / own for other, own in pairs if other and own and math.isfinite(other / own)]
    return Speedup(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def seeds_of(comparison: Comparison) -> list[int]:
    """Every seed that was asked for or run."""
    asked = (comparison.get("settings") or {}).get("seeds") or ()
    return sorted({*asked, *(run["seed"] for run in comparison.get("runs") or ())})


def missing_parts(comparison: Comparison) -> list[str]:
    """What a complete comparison would hold and this one doesn't, one sentence each."""
    by_arm = runs_by_arm(comparison)
    arms = in_order([*((comparison.get("settings") or {}).get("arms") or ()), *by_arm])
    lines = []
    for arm in arms:
        runs = by_arm.get(arm, [])
        absent = sorted(set(seeds_of(comparison)) - {run["seed"] for run in runs})
        diverged = sorted({run["seed"] for run in runs} - finite_losses(runs).keys())
        if not runs:
            lines.append(f"No run of {arm}.")
        elif absent:
            lines.append(f"No run of {arm} with {_seeds(absent)}.")
        if diverged:
            lines.append(f"{arm} diverged with {_seeds(diverged)}: the loss was no longer a finite number.")
    lines += [f"No run of {base}, so no difference from it." for base in BASELINES if base not in arms]
    return lines + _missing_prefill(comparison, [arm for arm in arms if arm in by_arm])


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


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}"
