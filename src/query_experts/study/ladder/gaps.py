"""Computes the mean loss of each arm at each rung and budget, and its paired differences from the baselines.

A pair is two runs of one rung, budget and seed whose code has the same tag and whose tokens have the same hash. A pair
whose runs used different processor instructions or versions of torch is kept and marked, as kernels alone move a run;
so is one without a tag whose code is of different commits, or has changes that no commit holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from query_experts.model.arms import in_order
from query_experts.study.ladder.results import MIXED, LadderResult
from query_experts.study.statistics import MIN_SEEDS_FOR_INTERVAL, PairedDifference, paired_difference, sign

BASELINES = ("dense", "static", "half")
RANDOM = "frozen"  # gqe's further baseline: a router that never trains
FLOPS_PER_PARAMETER = 6  # a token, forward and backward
CHANGED = "+"  # at the end of a commit: with changes that no commit holds
CONTROLS = (*BASELINES, RANDOM)  # all other arms are studied

Known = Literal["lower", "higher", "not known"]


def what_is_known(low: float | None, high: float | None) -> Known:
    """The sign of a difference whose interval is [low, high]; not known if that holds both signs or there is none."""
    if low is None or high is None:
        return "not known"
    return "lower" if sign(high) < 0 else "higher" if sign(low) > 0 else "not known"


@dataclass(frozen=True)
class Gap:
    """The validation loss of an arm minus that of a baseline, at one rung and budget.

    Args:
        difference: Over the pairs; None without one.
        marked: Seeds of the pairs whose runs used different processor instructions, versions of torch, or, without a
            tag, code that isn't of one commit.
        other_tag: Seeds that have both runs but no pair, as their code has different tags.
        other_tokens: The same, as their tokens have different hashes.
    """

    arm: str
    base: str
    difference: PairedDifference | None
    marked: list[int]
    other_tag: list[int]
    other_tokens: list[int]

    @property
    def pairs(self) -> int:
        return len(self.difference.differences) if self.difference is not None else 0

    @property
    def known(self) -> Known:
        return what_is_known(self.difference.low, self.difference.high) if self.difference else "not known"

    @property
    def has_interval(self) -> bool:
        return self.pairs >= MIN_SEEDS_FOR_INTERVAL


@dataclass(frozen=True)
class ArmRouting:
    """Routing at the end, over the seeds of an arm: mean entropy (share of log M), highest load, most dead experts."""

    entropy: float
    highest_load: float
    dead: int


@dataclass(frozen=True)
class ArmCell:
    """One arm at one rung and budget.

    Args:
        losses: Validation loss by seed, without the runs that diverged.
        diverged: Seeds of the runs that diverged.
        bits_per_byte: Mean over seeds; None where every run diverged.
        parts: The same by validation file.
        parameters: All parameters.
        size: Parameters of the rung's dense arm without embeddings, of which a budget is so many tokens each; the
            arm's own where the rung has no dense arm.
        active_heads: Query heads that attend for a token in a layer.
        train_tokens: Tokens trained on.
        flops: Of training, as run.
        active_flops: Of training, only what a token uses.
        train_seconds: Median over the runs that finished; None where every run diverged.
        routing: Held-out routing at the end; None without a router.
        gaps: By baseline.
        learning_rate: The highest of its runs; None where results don't tell it.
    """

    arm: str
    losses: dict[int, float]
    diverged: list[int]
    bits_per_byte: float | None
    parts: dict[str, float]
    parameters: int
    size: int
    active_heads: int
    train_tokens: int
    flops: float
    active_flops: float
    train_seconds: float | None
    routing: ArmRouting | None
    gaps: dict[str, Gap]
    learning_rate: float | None = None

    @property
    def mean(self) -> float | None:
        """Validation loss, mean over seeds."""
        return statistics.fmean(self.losses.values()) if self.losses else None

    @property
    def counts(self) -> bool:
        """Whether there are enough seeds to tell the spread of the mean, so that a fit may use it."""
        return len(self.losses) >= MIN_SEEDS_FOR_INTERVAL


@dataclass(frozen=True)
class Cell:
    """All arms at one rung and budget; `arms` is in the study's order."""

    rung: str
    budget: float
    arms: dict[str, ArmCell]

    @property
    def size(self) -> tuple[int, int]:
        """Parameters without embeddings and training tokens of dense, or of the first arm."""
        first = next(iter(self.arms.values()))
        return first.size, first.train_tokens

    def compute(self, arm: str) -> float:
        """6 N D of an arm's training, with its `size` as N: the same for all arms of a rung with a dense one."""
        return training_flops(self.arms[arm].size, self.arms[arm].train_tokens)

    def gap(self, arm: str, base: str) -> Gap | None:
        return self.arms[arm].gaps.get(base) if arm in self.arms else None


def compared(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Each arm with each baseline, every two arms once."""
    return [(arm, base) for arm in arms for base in _bases_of(arm) if base in arms]


def _bases_of(arm: str) -> Sequence[str]:
    if arm in BASELINES:
        return BASELINES[: BASELINES.index(arm)]
    return (*BASELINES, RANDOM) if arm == "gqe" else BASELINES


def rungs_by_size(results: Sequence[LadderResult]) -> list[str]:
    """Names of the rungs, the smallest model first; embeddings don't count."""
    smallest = {result.rung: _size(result) for result in sorted(results, key=_size, reverse=True)}
    return sorted(smallest, key=lambda rung: (smallest[rung], rung))


def cells_of(results: Sequence[LadderResult]) -> list[Cell]:
    """Every rung and budget that has a run: the smallest rung first, and of a rung the smallest budget."""
    cells = []
    for rung in rungs_by_size(results):
        own = [result for result in results if result.rung == rung]
        cells += [_cell(rung, budget, own) for budget in sorted({result.budget for result in own})]
    return cells


def _size(result: LadderResult) -> int:
    return result.parameters - result.embedding_parameters


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D: forward and backward, attention and embeddings not counted."""
    return FLOPS_PER_PARAMETER * parameters * tokens


def _cell(rung: str, budget: float, results: Sequence[LadderResult]) -> Cell:
    own = sorted((result for result in results if result.budget == budget), key=lambda result: result.seed)
    runs = {arm: {r.seed: r for r in own if r.arm == arm} for arm in in_order(r.arm for r in own)}
    dense = next((result for result in results if result.arm == "dense"), None)
    return Cell(rung, budget, {arm: _arm_cell(arm, runs, dense) for arm in runs})


def _arm_cell(arm: str, runs: Mapping[str, Mapping[int, LadderResult]], dense: LadderResult | None) -> ArmCell:
    own = list(runs[arm].values())
    finished, first = [run for run in own if not run.diverged], own[0]
    bits = [run.bits_per_byte for run in finished if run.bits_per_byte is not None]
    return ArmCell(
        arm=arm,
        losses=_losses(runs[arm]),
        diverged=[run.seed for run in own if run.diverged],
        bits_per_byte=statistics.fmean(bits) if bits else None,
        parts=_parts(finished),
        parameters=first.parameters,
        size=_size(dense or first),
        active_heads=first.active_heads,
        train_tokens=max(run.train_tokens for run in finished or own),
        flops=max(run.flops for run in finished or own),
        active_flops=max(run.active_flops for run in finished or own),
        train_seconds=statistics.median(run.train_seconds for run in finished) if finished else None,
        routing=_routing(finished),
        gaps={base: gap_between(arm, base, runs[arm], runs[base]) for base in _bases_of(arm) if base in runs},
        learning_rate=max(filter(None, (run.settings.get("learning_rate") for run in own)), default=None),
    )


def _parts(runs: Sequence[LadderResult]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for part in (part for run in runs for part in run.parts):
        found.setdefault(part.name, []).append(part.bits_per_byte)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _routing(runs: Sequence[LadderResult]) -> ArmRouting | None:
    loads = [run.routing for run in runs if run.routing is not None]
    if not loads:
        return None
    return ArmRouting(
        statistics.fmean(load.mean_entropy for load in loads),
        max(load.highest_load for load in loads),
        max(load.dead for load in loads),
    )


def _losses(runs: Mapping[int, LadderResult]) -> dict[int, float]:
    losses = {seed: run.validation_loss for seed, run in runs.items() if not run.diverged}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def gap_between(arm: str, base: str, own: Mapping[int, LadderResult], other: Mapping[int, LadderResult]) -> Gap:
    """The gap of two groups of runs, each by seed, of one rung and budget."""
    a, b = _losses(own), _losses(other)
    both = [seed for seed in a if seed in b]
    other_tag = [seed for seed in both if own[seed].tag != other[seed].tag]
    other_tokens = [seed for seed in both if seed not in other_tag and own[seed].data_hash != other[seed].data_hash]
    paired = [seed for seed in both if seed not in {*other_tag, *other_tokens}]
    return Gap(
        arm,
        base,
        paired_difference({seed: a[seed] for seed in paired}, b),
        marked=[seed for seed in paired if _is_marked(own[seed], other[seed])],
        other_tag=other_tag,
        other_tokens=other_tokens,
    )


def _is_marked(a: LadderResult, b: LadderResult) -> bool:
    pieces = [*a.pieces, *b.pieces]
    if a.instructions != b.instructions or a.instructions == MIXED or len({piece.torch for piece in pieces}) > 1:
        return True
    commits = {piece.commit for piece in pieces}
    return a.tag is None and (len(commits) > 1 or any(str(name).endswith(CHANGED) for name in commits))
