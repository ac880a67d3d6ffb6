"""Measures how much gqe - static differs between seeds for candidates of the demo: the smaller, the more it tells.

python benchmarks/demo_spread.py [CANDIDATE ...] [--seeds 0 1 2 3 4 5] [--out runs/demo-spread]

demo_spread.yaml has the candidates. Finished runs aren't repeated. Writes all candidates in `out` to
benchmarks/results/demo-spread.json, and their table into docs/comparing.md. Losses don't depend on what else the
machine does.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from rich.console import Console

from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.common.files import write_json
from query_experts.study.compare import compare
from query_experts.study.results import Comparison, parse_comparison
from query_experts.study.settings import CompareSettings
from query_experts.study.statistics import paired_difference

CANDIDATES = Path(__file__).with_suffix(".yaml")
RESULT = Path(__file__).resolve().parent / "results" / "demo-spread.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "comparing.md"
SCRIPT = "benchmarks/demo_spread.py"  # in the marker of its table
ARMS = ("static", "gqe")


@dataclass(frozen=True)
class Candidate:
    """Settings of a demo, and what its runs came to.

    Attributes:
        name: Its key in demo_spread.yaml.
        settings: What it sets apart from the defaults of `compare`.
        train_tokens: Tokens of each run.
        parameters: Those of gqe.
        bits_per_byte: By arm and seed.
        hardware: Where its runs were trained.
        commit: The code that gathered the results.
    """

    name: str
    settings: dict[str, Any]
    train_tokens: int
    parameters: int
    bits_per_byte: dict[str, dict[int, float]]
    hardware: str
    commit: str | None

    @property
    def differences(self) -> list[float]:
        """gqe - static in bits per byte, by seed."""
        pairs = paired_difference(self.bits_per_byte["gqe"], self.bits_per_byte["static"])
        return [*pairs.differences.values()] if pairs is not None else []

    @property
    def spread(self) -> float:
        """Standard deviation of the differences over the seeds."""
        return statistics.stdev(self.differences)

    def mean(self, arm: str) -> float:
        return statistics.fmean(self.bits_per_byte[arm].values())


def main() -> None:
    known = yaml.safe_load(CANDIDATES.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="*", metavar="CANDIDATE", help=f"any of {', '.join(known)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(6)])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-spread"), help="folder for the runs")
    options = parser.parse_args()
    if unknown := {*options.candidates} - {*known}:
        parser.error(f"CANDIDATE is {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
    for name in options.candidates or known:
        train(name, known[name], options)
    candidates = [
        candidate(name, settings, parse_comparison((options.out / name / "comparison.json").read_text("utf-8")))
        for name, settings in known.items()
        if (options.out / name / "comparison.json").exists()
    ]
    write_json(RESULT, {"candidates": [asdict(each) for each in candidates]})
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(candidates))


def train(name: str, settings: dict[str, Any], options: argparse.Namespace) -> None:
    out = str(options.out / name)
    compare(
        CompareSettings(
            **settings, arms=[*ARMS], seeds=options.seeds, dtype="float32", device="cpu", out=out,
            prefill_lengths=[16], prefill_repeats=1,
        ),
        Console(),
    )  # fmt: skip


def candidate(name: str, settings: dict[str, Any], comparison: Comparison) -> Candidate:
    runs = {arm: {run.seed: run for run in comparison.runs if run.arm == arm} for arm in ARMS}
    gqe = next(iter(runs["gqe"].values()))
    return Candidate(
        name=name,
        settings=settings,
        train_tokens=gqe.train_tokens,
        parameters=gqe.parameters.total,
        bits_per_byte={
            arm: {seed: run.bits_per_byte for seed, run in of_arm.items() if run.bits_per_byte is not None}
            for arm, of_arm in runs.items()
        },
        hardware=comparison.environment.hardware,
        commit=comparison.environment.commit,
    )


def read_candidates() -> list[Candidate]:
    """The committed measurement."""
    return TypeAdapter(dict[str, list[Candidate]]).validate_json(RESULT.read_bytes())["candidates"]


def filled(page: str) -> str:
    """The page with the table of the committed measurement."""
    return with_tables(page, SCRIPT, lambda _: table(read_candidates()))


def table(candidates: list[Candidate]) -> str:
    head = ["candidate", "parameters", "tokens", "seeds", *(f"`{arm}`" for arm in ARMS), "`gqe` - `static`", "spread"]
    return markdown([head, *(cells(each) for each in candidates)])


def cells(candidate: Candidate) -> list[str]:
    return [
        candidate.name,
        text.short(candidate.parameters),
        text.short(candidate.train_tokens),
        str(len(candidate.differences)),
        *(text.fixed(candidate.mean(arm), 3) for arm in ARMS),
        text.signed(statistics.fmean(candidate.differences), 4),
        text.fixed(candidate.spread, 4),
    ]


if __name__ == "__main__":
    main()
