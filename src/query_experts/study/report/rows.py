"""Computes what the report shows of each arm: losses, paired differences and speeds; and lists what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from query_experts.common.formatting import DIVERGED, MISSING, join_words, length_name, name_seeds
from query_experts.model.arms import in_order
from query_experts.study.results import Comparison, RunResult
from query_experts.study.statistics import PairedDifference, disturbed, paired_difference

BASELINES = ("dense", "static")
SAME_SPEED = 0.03  # relative difference of training speeds up to which they count as the same
SAME_SIZE = 0.005  # relative difference of parameters below which models count as of the same size

Losses = Mapping[str, Mapping[int, float]]  # by arm and seed


@dataclass(frozen=True)
class Speedup:
    """Speed relative to a baseline: the median and range of ratios that were taken repeat by repeat."""

    median: float
    low: float
    high: float
    repeats: int
    disturbed: bool

    @property
    def outcome(self) -> Literal["faster", "slower", "unclear", "disturbed"]:
        """Faster or slower only if it is in every repeat, and no other work disturbed the timing."""
        if self.disturbed:
            return "disturbed"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "unclear"


@dataclass(frozen=True)
class TrainingSpeed:
    """Training speed relative to dense, minus one, by seed."""

    changes: dict[int, float]

    @property
    def outcome(self) -> Literal["same", "faster", "slower", "mixed"]:
        """The same up to 3%; otherwise faster or slower only if it is on every seed."""
        changes = self.changes.values()
        if max(abs(change) for change in changes) <= SAME_SPEED:
            return "same"
        return "faster" if min(changes) > 0 else "slower" if max(changes) < 0 else "mixed"


@dataclass(frozen=True)
class Row:
    """One arm of the comparison. None stands for what was not measured.

    Args:
        tokens_per_s: Training speed, the median over seeds.
        losses: Validation loss by seed.
        diverged: Seeds of the runs that diverged.
        versus: Paired difference of the losses from each baseline.
        unequal_size: Relative difference of parameters from each baseline, where it is half a percent or more.
        training_speed: Relative to dense, by seed.
        prefill: Speed relative to dense by prompt length.
        prefill_over_static: Speed relative to static by prompt length.
        prefill_seconds: Median time by prompt length.
    """

    arm: str
    total_parameters: int
    active_parameters: int
    active_heads: str
    flops_per_token: float
    kv_bytes_per_token: int
    tokens_per_s: float | None
    losses: dict[int, float]
    diverged: list[int]
    versus: dict[str, PairedDifference | None]
    unequal_size: dict[str, float]
    training_speed: TrainingSpeed | None
    prefill: dict[int, Speedup | None]
    prefill_over_static: dict[int, Speedup | None]
    prefill_seconds: dict[int, float | None]

    @property
    def loss_mean(self) -> float | None:
        """Validation loss, mean over seeds."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def loss_spread(self) -> float | None:
        """Highest minus lowest validation loss over seeds, from two seeds on."""
        return max(self.losses.values()) - min(self.losses.values()) if len(self.losses) > 1 else None


def runs_by_arm(comparison: Comparison) -> dict[str, list[RunResult]]:
    """The runs of every arm that has any, in the study's order, sorted by seed."""
    runs = sorted(comparison.runs, key=lambda run: run.seed)
    arms = in_order(run.arm for run in runs)
    return {arm: [run for run in runs if run.arm == arm] for arm in arms}


def completed_runs(comparison: Comparison) -> list[RunResult]:
    """All runs but those that diverged."""
    return [run for runs in runs_by_arm(comparison).values() for run in runs if not run.diverged]


def losses_by_arm(comparison: Comparison) -> dict[str, dict[int, float]]:
    """Validation loss by arm and seed; a run that diverged has none."""
    return {
        arm: {run.seed: run.validation_loss for run in runs if run.validation_loss is not None and not run.diverged}
        for arm, runs in runs_by_arm(comparison).items()
    }


def summary_rows(comparison: Comparison) -> list[Row]:
    """One row for each arm that has a run, in the study's order."""
    losses = losses_by_arm(comparison)
    return [_row(comparison, arm, runs, losses) for arm, runs in runs_by_arm(comparison).items()]


def _row(comparison: Comparison, arm: str, runs: list[RunResult], losses: Losses) -> Row:
    first, own, lengths = runs[0], losses[arm], prefill_lengths(comparison)
    speeds = [run.tokens_per_s for run in runs if not run.diverged]
    return Row(
        arm=arm,
        total_parameters=first.parameters.total,
        active_parameters=first.parameters.active,
        active_heads=f"{first.active_attention_heads}/{first.dense_attention_heads}",
        flops_per_token=first.flops_per_token,
        kv_bytes_per_token=first.kv_bytes_per_token,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        losses=dict(own),
        diverged=[run.seed for run in runs if run.diverged],
        versus={base: None if base == arm else paired_difference(own, losses.get(base, {})) for base in BASELINES},
        unequal_size=_unequal_size(comparison, first),
        training_speed=_training_speed(comparison, arm),
        prefill={length: prefill_speedup(comparison, arm, length) for length in lengths},
        prefill_over_static={length: prefill_speedup(comparison, arm, length, "static") for length in lengths},
        prefill_seconds={length: prefill_median(comparison, arm, length) for length in lengths},
    )


def _unequal_size(comparison: Comparison, run: RunResult) -> dict[str, float]:
    by_arm = runs_by_arm(comparison)
    sizes = {base: by_arm[base][0].parameters.total for base in BASELINES if base in by_arm and base != run.arm}
    changes = {base: run.parameters.total / size - 1 for base, size in sizes.items()}
    return {base: change for base, change in changes.items() if abs(change) >= SAME_SIZE}


def _training_speed(comparison: Comparison, arm: str) -> TrainingSpeed | None:
    """Compares runs of the same seed, which follow one another: the speed of a machine drifts."""
    if arm == "dense":
        return None
    speeds = {(run.arm, run.seed): run.tokens_per_s for run in completed_runs(comparison)}
    seeds = sorted(seed for name, seed in speeds if name == arm and ("dense", seed) in speeds)
    return TrainingSpeed({seed: speeds[arm, seed] / speeds["dense", seed] - 1 for seed in seeds}) if seeds else None


def prefill_lengths(comparison: Comparison) -> list[int]:
    """The prompt lengths at which prefill was timed, or none."""
    return comparison.prefill.lengths if comparison.prefill is not None else []


def prefill_speedup(comparison: Comparison, arm: str, length: int, base: str = "dense") -> Speedup | None:
    """Speed of `arm` relative to `base` at one length; None unless both were timed."""
    if comparison.prefill is None:
        return None
    baseline, own = (comparison.prefill.seconds_of(name, length) for name in (base, arm))
    ratios = [other / seconds for other, seconds in zip(baseline, own, strict=False)]
    if not ratios:
        return None
    either_disturbed = disturbed(baseline) or disturbed(own)
    return Speedup(statistics.median(ratios), min(ratios), max(ratios), len(ratios), either_disturbed)


def prefill_median(comparison: Comparison, arm: str, length: int) -> float | None:
    """Median seconds of an arm at one length, or None where it was not timed."""
    repeats = comparison.prefill.seconds_of(arm, length) if comparison.prefill is not None else []
    return statistics.median(repeats) if repeats else None


def seeds_of(comparison: Comparison) -> list[int]:
    """Every seed that was asked for or run."""
    asked = comparison.settings.seeds if comparison.settings is not None else []
    return sorted({*asked, *(run.seed for run in comparison.runs)})


def arms_of(comparison: Comparison) -> list[str]:
    """Every arm that was asked for or run, in the study's order."""
    asked = comparison.settings.arms if comparison.settings is not None else []
    return in_order([*asked, *(run.arm for run in comparison.runs)])


def by_seed(
    values: Mapping[int, float], diverged: Collection[int], asked: list[int], write: Callable[[float], str]
) -> list[str]:
    """A value for each seed that was asked for, or a word for its absence: diverged or missing."""
    absent = {seed: DIVERGED if seed in diverged else MISSING for seed in asked}
    return [write(values[seed]) if seed in values else absent[seed] for seed in asked]


def missing_parts(comparison: Comparison) -> list[str]:
    """What a complete comparison would hold and this one doesn't, one sentence each."""
    by_arm, arms, lines = runs_by_arm(comparison), arms_of(comparison), []
    for arm in arms:
        runs = by_arm.get(arm, [])
        absent = sorted(set(seeds_of(comparison)) - {run.seed for run in runs})
        if not runs:
            lines.append(f"No run of {arm}.")
        elif absent:
            lines.append(f"No run of {arm} with {name_seeds(absent)}.")
    finished = {run.arm for run in completed_runs(comparison)}
    return lines + _missing_prefill(comparison, [arm for arm in arms if arm in finished])


def _missing_prefill(comparison: Comparison, arms: list[str]) -> list[str]:
    lengths = prefill_lengths(comparison)
    if not lengths:
        return ["Prefill was not timed."]
    if all(prefill_speedup(comparison, "dense", length) is None for length in lengths):
        return ["Prefill was not timed for dense, so there is no speed relative to it."]
    untimed: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        absent = [length_name(length) for length in lengths if prefill_speedup(comparison, arm, length) is None]
        if absent:
            untimed.setdefault(tuple(absent), []).append(arm)
    return [
        f"Prefill of {join_words(names)} was not timed"
        + (f" at {join_words(absent)} tokens." if len(absent) < len(lengths) else ".")
        for absent, names in untimed.items()
    ]
