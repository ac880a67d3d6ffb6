"""Measures from how many experts in a group on it is faster to project only the selected ones, for one token.

python benchmarks/sparse_projection.py    # on an idle machine; writes benchmarks/results/woken-cpu.json

The result decides `SPARSE_FROM` of ops/select.py. Its keys `all` and `woken` mean: all experts or only the selected
ones are projected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from query_experts.bench.json_reader import read_result
from query_experts.bench.models import Layer
from query_experts.bench.results import BASELINE, spread_of_ratios
from query_experts.bench.settings import BenchSettings
from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.common.timing import Call, time_interleaved
from query_experts.ops import select

RESULT = Path(__file__).resolve().parent / "results" / "woken-cpu.json"
CACHED, REPEATS = 4096, 15
ALL, SELECTED_ONLY = "all", "woken"


@dataclass(frozen=True)
class Point:
    """Seconds of one decoding step of a layer, by kind: dense, ALL or SELECTED_ONLY."""

    experts_per_group: int
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class SparseProjection:
    """All of the result file."""

    cached: int
    sparse_from: int
    environment: Environment
    points: list[Point]


def read_sparse_projection() -> SparseProjection:
    return read_result(RESULT, SparseProjection, "a result of sparse_projection.py")


def with_choice(call: Call, selected_only: bool) -> Callable[[], object]:
    """The call with the layer's own choice replaced."""

    def chosen() -> object:
        select.reads_selected_rows = lambda *_: selected_only  # the function that decides in the layer
        return call()

    return chosen


def measure(heads: int) -> Point:
    settings = BenchSettings(device="cpu", num_attention_heads=heads)
    calls = {
        kind: Layer(settings, arm, "cpu", CACHED + 1).cached("static", 1, CACHED, 1)
        for kind, arm in ((BASELINE, "dense"), (ALL, "gqe"), (SELECTED_ONLY, "gqe"))
    }
    for kind in (ALL, SELECTED_ONLY):
        calls[kind] = with_choice(calls[kind], kind == SELECTED_ONLY)
    return Point(heads // settings.num_key_value_heads, time_interleaved(calls, REPEATS, "cpu"))


def main() -> None:
    points = []
    for heads in (16, 32, 64, 128):
        point = measure(heads)
        points.append(point)
        speed = spread_of_ratios(point.seconds[ALL], point.seconds[SELECTED_ONLY])
        print(
            f"{point.experts_per_group} experts in a group: projecting only the selected is {speed.median:.2f} times "
            f"as fast ({speed.low:.2f} to {speed.high:.2f})"
        )
    ran_in = environment("cpu", "bfloat16")
    write_json(RESULT, asdict(SparseProjection(CACHED, select.SPARSE_FROM, ran_in, points)))


if __name__ == "__main__":
    main()
