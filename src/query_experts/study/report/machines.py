"""Lists the machines and package versions that the runs were trained with.

Result files from before pieces were recorded don't name them.
"""

from __future__ import annotations

from itertools import groupby

from query_experts.common.formatting import name_seeds
from query_experts.study.report.rows import completed_runs, runs_by_arm
from query_experts.study.results import Comparison, Piece, RunResult

UNKNOWN = "not recorded"


def trained_on(comparison: Comparison) -> list[str]:
    """A line for each machine with its versions, and the runs or parts of runs that it trained."""
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    for arm, runs in runs_by_arm(comparison).items():
        for run in runs:
            for machine, steps in _machines(run):
                found.setdefault(machine, {}).setdefault((arm, steps), []).append(run.seed)
    if len(found) == 1:
        return [f"{machine} (every run)" for machine in found if machine != UNKNOWN]
    return [f"{machine} ({_runs(trained)})" for machine, trained in found.items()]


def hardware(comparison: Comparison) -> list[str]:
    """The hardware that the completed runs were trained on, each once."""
    names = [
        name for run in completed_runs(comparison) for name in [piece.hardware for piece in run.pieces] or [UNKNOWN]
    ]
    return list(dict.fromkeys(names))


def _machines(run: RunResult) -> list[tuple[str, str]]:
    """The machines of a run in their order, each with the steps that it trained."""
    starts = [(name, next(group).first_step) for name, group in groupby(run.pieces, _machine)]
    if not starts:
        return [(UNKNOWN, "")]
    ends = [*(first for _, first in starts[1:]), None]
    return [(name, _steps(first, end)) for (name, first), end in zip(starts, ends, strict=True)]


def _machine(piece: Piece) -> str:
    return (
        f"{piece.hardware}, torch {piece.torch}, transformers {piece.transformers}, "
        f"query-experts {piece.query_experts}, python {piece.python}"
    )


def _steps(first: int, end: int | None) -> str:
    return (f" from step {first}" if first else "") + (f" to step {end}" if end else "")


def _runs(trained: dict[tuple[str, str], list[int]]) -> str:
    return "; ".join(f"{arm} {name_seeds(seeds)}{steps}" for (arm, steps), seeds in trained.items())
