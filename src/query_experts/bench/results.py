"""The results of the benchmark as dataclasses, and the one reader of each file that holds them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from query_experts.bench.json_reader import read_result
from query_experts.bench.settings import BASELINE, FUSED_BASELINE, BenchSettings
from query_experts.common.environment import Environment
from query_experts.common.files import write_json

LAYER = "layer"  # the stage that the other stages are parts of
STOCK = "stock"  # what computes the layers of Transformers' own Llama


class Spread(NamedTuple):
    """The median of several measurements, and their range."""

    median: float
    low: float
    high: float


def spread_of_ratios(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """Baseline over other, repeat by repeat."""
    ratios = [numerator / denominator for numerator, denominator in zip(baseline, other, strict=True)]
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Check:
    """Largest errors against float64: of the call that is timed, and of a plain call in the same dtype."""

    arm: str
    what: str
    error: float
    plain: float
    passed: bool


@dataclass(frozen=True)
class Point:
    """One suite at one length, at which all arms are timed.

    Args:
        suite: A key of `SUITES`.
        length: Tokens of the prompt or the training sequence; in decoding, cached tokens.
        batch: Number of sequences.
        cache: static, dynamic or None.
    """

    suite: str
    length: int
    batch: int = 1
    cache: str | None = None

    def describe(self) -> str:
        batch = f", batch {self.batch}" if self.cache or self.batch > 1 else ""
        return f"{self.suite} {self.length}{batch}" + (f", {self.cache} cache" if self.cache else "")


@dataclass(frozen=True, kw_only=True)
class PointResult(Point):
    """What was measured at a point, by arm.

    Args:
        seconds: Time of one call, one value for each repeat.
        peak_bytes: Memory that one call holds at most, beyond what was held before it.
        predicted: Speedup over the baseline that `costs` predicts.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    predicted: dict[str, float]

    def __post_init__(self) -> None:
        """Raises ValueError where arms are missing or were not timed equally often."""
        if not BASELINE in self.seconds.keys() == self.peak_bytes.keys() == self.predicted.keys():
            raise ValueError(
                f"{self.describe()} must hold seconds, peak_bytes and predicted of {BASELINE} and each arm"
            )
        _check_repeats(self, self.seconds)

    def speedup(self, arm: str, over: str = BASELINE) -> Spread:
        """Seconds of a baseline over those of the arm."""
        return spread_of_ratios(self.seconds[over], self.seconds[arm])

    def speedup_over_fused(self, arm: str) -> Spread | None:
        """Seconds of dense-fused over those of the arm; None where it wasn't timed, and for the two baselines."""
        if FUSED_BASELINE not in self.seconds or arm in (BASELINE, FUSED_BASELINE):
            return None
        return self.speedup(arm, FUSED_BASELINE)


@dataclass(frozen=True, kw_only=True)
class PartsResult(Point):
    """Seconds of each stage of the gqe layer, one value for each repeat."""

    seconds: dict[str, list[float]]

    def __post_init__(self) -> None:
        """Raises ValueError where the layer is missing or stages were not timed equally often."""
        if LAYER not in self.seconds:
            raise ValueError(f"{self.describe()} must hold seconds of {LAYER}")
        _check_repeats(self, self.seconds)


def _check_repeats(point: Point, seconds: dict[str, list[float]]) -> None:
    repeats = {len(times) for times in seconds.values()}
    if len(repeats) != 1 or 0 in repeats:
        raise ValueError(f"{point.describe()} must hold as many seconds of each call, one or more")


@dataclass(frozen=True)
class BenchResult:
    """All of bench.json.

    Args:
        kernels: What computes each arm's layers: stock (Transformers' Llama), torch or triton; older files lack it.
    """

    settings: BenchSettings
    environment: Environment
    checks: list[Check]
    points: list[PointResult | PartsResult]
    kernels: dict[str, str] | None = None

    def speed_points(self, *suites: str) -> list[PointResult]:
        """The points that compare arms, of these suites or of all."""
        points = [point for point in self.points if isinstance(point, PointResult)]
        return [point for point in points if not suites or point.suite in suites]

    def parts_points(self) -> list[PartsResult]:
        return [point for point in self.points if isinstance(point, PartsResult)]


def write_bench(path: Path, result: BenchResult) -> None:
    write_json(path, dataclasses.asdict(result))


def read_bench(path: Path) -> BenchResult:
    """Reads a bench.json. Raises SettingError for any other file."""
    return read_result(path, BenchResult, "a bench.json")


@dataclass(frozen=True)
class PytestOutcome:
    """How the tests of the GPU suite ended.

    Args:
        status: Exit status of pytest; None where time ran out.
        last: The last lines that it printed.
    """

    status: int | None
    last: list[str]


@dataclass(frozen=True)
class PartOutcome:
    """How one part of the GPU suite ended.

    Args:
        status: Exit status; None where time ran out.
        bench: What it measured until then; None if nothing.
        last: The end of what it printed, where it failed.
        numbers: By name what a part measured that times no arms; older files lack it.
    """

    status: int | None
    bench: BenchResult | None
    last: str | None = None
    numbers: dict[str, float] | None = None


@dataclass(frozen=True)
class GpuResult:
    """All of gpu.json."""

    dry: bool
    tests: PytestOutcome
    parts: dict[str, PartOutcome]


def write_gpu(path: Path, result: GpuResult) -> None:
    value = dataclasses.asdict(result)
    for part in value["parts"].values():
        for name in ("last", "numbers"):  # only where there is something
            if part[name] is None:
                del part[name]
    write_json(path, value)


def read_gpu(path: Path) -> GpuResult:
    """Reads a gpu.json. Raises SettingError for any other file."""
    return read_result(path, GpuResult, "a gpu.json")
