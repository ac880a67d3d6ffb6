"""Owns where the runs were trained: each machine with its versions, and the runs, or parts of them, that it trained.

Result files from before pieces were noted don't say where they come from.
"""

from __future__ import annotations

from itertools import groupby

from query_experts.common.formatting import seeds
from query_experts.study.report.rows import Comparison, Run, completed_runs, runs_by_arm

VERSIONS = ("torch", "transformers", "query_experts", "python")
UNKNOWN = "not recorded"


def trained_on(comparison: Comparison) -> list[str]:
    """A line for each machine and set of versions, with what it trained; none where no run says."""
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    for arm, runs in runs_by_arm(comparison).items():
        for run in runs:
            for machine, steps in _stretches(run):
                found.setdefault(machine, {}).setdefault((arm, steps), []).append(run["seed"])
    if len(found) == 1:
        return [f"{machine} (every run)" for machine in found if machine != UNKNOWN]
    return [f"{machine} ({_listed(trained)})" for machine, trained in found.items()]


def hardware(comparison: Comparison) -> list[str]:
    """The hardware that runs were trained on, each once; of runs that diverged nothing is compared."""
    unknown = [{"hardware": UNKNOWN}]
    pieces = [piece for run in completed_runs(comparison) for piece in run.get("pieces") or unknown]
    return list(dict.fromkeys(piece["hardware"] for piece in pieces))


def _stretches(run: Run) -> list[tuple[str, str]]:
    """Machines in the order in which they trained a run, and from and to which step."""
    starts = [(name, next(group)["first_step"]) for name, group in groupby(run.get("pieces") or (), _machine)]
    if not starts:
        return [(UNKNOWN, "")]
    ends = [*(first for _, first in starts[1:]), None]
    return [(name, _steps(first, end)) for (name, first), end in zip(starts, ends, strict=True)]


def _machine(piece: Run) -> str:
    versions = [f"{name.replace('_', '-')} {piece[name]}" for name in VERSIONS if name in piece]
    return ", ".join([piece["hardware"], *versions])


def _steps(first: int, end: int | None) -> str:
    return (f" from step {first}" if first else "") + (f" to step {end}" if end else "")


def _listed(trained: dict[tuple[str, str], list[int]]) -> str:
    return "; ".join(f"{arm} {seeds(numbers)}{steps}" for (arm, steps), numbers in trained.items())
