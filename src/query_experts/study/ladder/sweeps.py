"""Compares the values of a swept setting, such as a coefficient, with each other and with the rung's own value.

Learning rates have a table of their own (rates.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from query_experts.common import formatting as text
from query_experts.model.arms import in_order
from query_experts.study.ladder.gaps import Gap, gap_between, rungs_by_size
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.settings import Ladder, Run
from query_experts.study.ladder.tables import difference_text, gap_warnings
from query_experts.study.report.table import Table

OWN = "own value"


@dataclass(frozen=True)
class SweptValue:
    """The runs of an arm at a rung with one value of a setting.

    Args:
        budget: The largest at which the arm was swept there.
        losses: Validation loss by seed, without the runs that diverged.
        diverged: Seeds of the runs that diverged.
        gap: Loss with this value minus that with the rung's own, paired by seed; its difference is None without a pair.
    """

    setting: str
    value: float
    rung: str
    arm: str
    budget: float
    losses: dict[int, float]
    diverged: list[int]
    gap: Gap

    @property
    def mean(self) -> float | None:
        """Validation loss, mean over seeds."""
        return statistics.fmean(self.losses.values()) if self.losses else None


def swept_values(results: Sequence[LadderResult], ladder: Ladder | None = None) -> list[SweptValue]:
    """Every value of every swept setting but the learning rate, the smallest rung first.

    Args:
        results: Those of the sweeps, and those with the rungs' own settings.
        ladder: Theirs. It says a rung's own value, whose runs are then the base where it is one of the swept ones.
    """
    found = []
    swept = [result for result in results if result.variant and result.swept != "learning_rate"]
    for setting in dict.fromkeys(result.swept for result in swept):
        own = [result for result in swept if result.swept == setting]
        for rung in rungs_by_size(own):
            for arm in in_order(result.arm for result in own if result.rung == rung):
                runs = [result for result in own if (result.rung, result.arm) == (rung, arm)]
                budget = max(result.budget for result in runs)
                at = [r for r in results if (r.rung, r.arm, r.budget) == (rung, arm, budget)]
                found += _values(setting, at, own_value(ladder, rung, arm, setting))
    return found


def own_value(ladder: Ladder | None, rung: str, arm: str, setting: str) -> float | None:
    """A setting of a rung outside of sweeps; None for a rung that the ladder doesn't have."""
    if ladder is None or rung not in ladder.rungs:
        return None
    return getattr(ladder.run_settings(Run(rung, arm, 0)), setting, None)


def _values(setting: str, results: Sequence[LadderResult], own: float | None) -> list[SweptValue]:
    """The values of a setting at one rung, arm and budget, the lowest first."""
    unchanged = {result.seed: result for result in results if not result.variant}
    values: dict[float, dict[int, LadderResult]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        if result.swept == setting:
            values.setdefault(result.swept_to, {})[result.seed] = result
    base = (values.get(own, {}) if own is not None else {}) | unchanged
    return [_value(setting, value, list(runs.values()), base) for value, runs in sorted(values.items())]


def _value(setting: str, value: float, runs: Sequence[LadderResult], own: Mapping[int, LadderResult]) -> SweptValue:
    first = runs[0]
    return SweptValue(
        setting, value, first.rung, first.arm, first.budget,
        losses={run.seed: run.validation_loss for run in runs if run.validation_loss is not None and not run.diverged},
        diverged=[run.seed for run in runs if run.diverged],
        gap=gap_between(first.arm, OWN, {run.seed: run for run in runs}, own),
    )  # fmt: skip


def sweep_tables(found: Sequence[SweptValue]) -> list[Table]:
    """A table for each swept setting."""
    return [
        _sweep_table(setting, [each for each in found if each.setting == setting])
        for setting in dict.fromkeys(each.setting for each in found)
    ]


def _sweep_table(setting: str, found: Sequence[SweptValue]) -> Table:
    return Table(
        title=f"Sweep of {setting}",
        note=" ".join(
            [
                "Loss: mean over seeds in nats a token, and their number; x: diverged. Means of different seeds don't "
                "compare. Difference: from the runs with the rung's own value, paired by seed, with its 95% interval "
                "(Student's t over seeds).",
                *gap_warnings([each.gap for each in found]),
            ]
        ),
        head=["arm", "rung", "value", "loss", f"from {OWN}"],
        body=[[each.arm, f"{each.rung}\n{each.budget:.0%}", f"{each.value:g}", _loss(each), difference_text(each.gap)]
              for each in found],
        left=(0, 1),
    )  # fmt: skip


def _loss(swept: SweptValue) -> str:
    diverged = f" ({len(swept.diverged)}x)" if swept.diverged else ""
    return f"{text.fixed(swept.mean)}\n{len(swept.losses)}{diverged}"
