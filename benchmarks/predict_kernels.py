"""Predicts what the fused kernels are worth on an H100, where none was at hand: a roofline model of one layer.

    python benchmarks/predict_kernels.py    # writes benchmarks/results/predicted-kernels.json and the pages' tables

On the GPU a layer takes launches, bytes of elementwise passes, FLOPs of projections and of attention, and the longest
tile of each call of attention, each at a rate. The rate of projections is read from the times of a layer's stages,
others are fitted to times of unfused layers, and that of fused passes is assumed. Eager calls take the GPU's time or
the host's, whichever is longer.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from page_tables import markdown, with_tables
from query_experts.bench.json_reader import read_result
from query_experts.bench.results import read_bench
from query_experts.bench.settings import BenchSettings
from query_experts.common import formatting as text
from query_experts.common.files import write_json
from query_experts.model import costs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "predicted-kernels.json"
PAGES = (ROOT / "docs" / "performance.md",)
SCRIPT = "benchmarks/predict_kernels.py"  # in the markers of its tables
PAPER = BenchSettings(device="cuda")
FUSED_BYTES = 2.4e12  # bytes/s, assumed: 80% of what a copy reaches on this GPU
LENGTHS = {"prefill": [2048, 4096, 8192, 16384, 32768], "train": [2048, 8192, 32768]}
MULTIPROCESSORS, TILE = 132, 128  # of the GPU, and query rows of a tile of attention
TWO_CALLS_FROM = 16384  # tokens, from which the fused layer gives the shared head a call of its own


class Counts(NamedTuple):
    """Kernels and all dispatched operators of one layer: prefill into a cache; forward and backward."""

    kernels: tuple[int, int]
    dispatches: tuple[int, int]


def counted(arm: str) -> Counts:
    """Of this code, by operator_counts.py."""
    counts = json.loads((RESULTS / "operator-counts.json").read_text(encoding="utf-8"))["counts"]
    found = [counts[what][arm] for what in ("prefill with a cache", "training, forward and backward")]
    kernels = [sum(c["kernels"].values()) + sum(c["launches"].values()) for c in found]
    return Counts((kernels[0], kernels[1]), (kernels[0] + found[0]["views"], kernels[1] + found[1]["views"]))


COUNTS = {  # of the code that was measured, by a script like operator_counts.py; and of the fused layers
    "dense": Counts((17, 42), (46, 113)),
    "static": Counts((30, 68), (81, 188)),
    "gqe": Counts((36, 97), (95, 242)),
    "dense-fused": counted("dense-fused, triton"),
    "gqe-fused": counted("gqe, triton"),
}


@dataclass(frozen=True)
class Rates:
    """What the model's times are made of.

    Args:
        launch: Seconds of a kernel in a CUDA graph.
        host: Seconds that the host takes for a dispatched operator, forwards and in training.
        passes: Bytes/s of unfused elementwise passes.
        fused_passes: Bytes/s of fused ones, assumed.
        projections: FLOP/s.
        attention: FLOP/s by backend, at long lengths.
        tail: Share of the longest tile that a call of attention adds, by backend.
        attention_back: FLOP/s of the backward pass by cuDNN.
    """

    launch: float
    host: list[float]
    passes: float
    fused_passes: float
    projections: float
    attention: dict[str, float]
    tail: dict[str, float]
    attention_back: float


@dataclass(frozen=True)
class Point:
    """One length.

    Args:
        modelled: Seconds by arm.
        measured: Median seconds by arm, where a committed result has them.
        measured_speed: Speed over dense by arm, the median of its repeats' ratios.
    """

    suite: str
    mode: str
    backend: str
    length: int
    modelled: dict[str, float]
    measured: dict[str, float]
    measured_speed: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """All of predicted-kernels.json.

    Args:
        worst: The largest |modelled / measured - 1| of the unfused layers by source, where the GPU is the limit.
        worst_of_host: The same, where the host is.
    """

    predicted: bool
    rates: Rates
    assumed: list[str]
    sources: list[str]
    worst: dict[str, float]
    worst_of_host: dict[str, float]
    points: list[Point]


def parts_of(arm: str, length: int, backward: bool = False) -> list[float]:
    """Kernels, bytes of passes, FLOPs of projections and of forward attention, and those of the longest tiles."""
    name = arm.removesuffix("-fused")
    work = costs.layer_work(PAPER.config(name, length), 1, length, backward=backward)
    N, G, k, d, D = PAPER.num_attention_heads, PAPER.num_key_value_heads, PAPER.active_query_experts, 64, 1024
    heads, shared = (N, 0) if name == "dense" else (G * k + 1, 1)
    slots = 0 if name == "dense" else G * k + 2
    if arm.endswith("-fused"):
        forward = back = 2 * (heads + 2 * G + 2 * shared) + (heads + slots) * shared
    else:
        forward = 10 * (heads + G) + shared * (2 * (G + 1) + G * k + 1 + 2 * slots)  # rotate; average; combine
        back = 15 * (heads + G) + 2 * (heads + G) + 6 * D // d + 2 * shared * (2 * (G + 1) + 2 * slots)
        if name == "gqe":
            forward, back = forward + 2 * (G * k + heads) + 5 * D // d, back + 2 * (N + heads) + 5 * D // d
    rows = forward + back if backward else forward + 4 * G  # prefill copies keys and values into the cache
    calls = 1 + shared * (not arm.endswith("-fused") or length >= TWO_CALLS_FROM)
    attention = work.attention_flops / (3.5 if backward else 1)
    tiles = calls * MULTIPROCESSORS * TILE * length * 4 * d
    return [COUNTS[arm].kernels[backward], rows * 2.0 * d * length, work.projection_flops, attention, tiles]


def measured(name: str, suite: str, least: int = 0) -> dict[tuple[str, int], float]:
    """Median seconds by arm and length in a committed result."""
    points = [p for p in read_bench(RESULTS / f"bench-h100-{name}.json").speed_points(suite) if p.length >= least]
    return {(arm, p.length): statistics.median(seconds) for p in points for arm, seconds in p.seconds.items()}


def measured_speeds(name: str, suite: str) -> dict[int, dict[str, float]]:
    """Speed over dense by length and arm in a committed result."""
    points = read_bench(RESULTS / f"bench-h100-{name}.json").speed_points(suite)
    return {point.length: {arm: point.speedup(arm).median for arm in point.seconds} for point in points}


def fitted(rows: list[list[float]], seconds: list[float], known: list[float]) -> list[float]:
    """Seconds for each unit of each column, none below zero: least squares of relative errors. known: other seconds."""
    scaled = np.array(rows) / np.array(seconds)[:, None]
    units = scaled.max(0)
    wanted = 1 - np.array(known) / np.array(seconds)
    return [float(value) for value in nnls(scaled / units, wanted)[0] / units]


def seconds_of_projections() -> float:
    """Seconds for a FLOP of the projections, by the stages of the longest prompt."""
    point = max(read_bench(RESULTS / "bench-h100-parts.json").parts_points(), key=lambda point: point.length)
    seconds = sum(statistics.median(point.seconds[stage]) for stage in ("project", "output projection"))
    heads, slots = PAPER.num_attention_heads + 1 + 2 * PAPER.num_key_value_heads, PAPER.num_key_value_heads + 2
    return seconds / (2 * point.length * PAPER.hidden_size * PAPER.head_dim * (heads + slots))


def fit() -> Rates:
    """The rates, from results in which the GPU is the limit; the host's from those in which it isn't."""
    projections = seconds_of_projections()
    flash = measured("prefill-graph", "prefill") | measured("prefill-flash", "prefill", 32768)
    columns = [[launches, moved, *attend] for launches, moved, _, *attend in (parts_of(*key) for key in flash)]
    rest = {key: parts_of(*key)[2] * projections for key in flash}
    launch, passes, attention, tail = fitted(columns, [*flash.values()], [*rest.values()])
    cudnn = measured("prefill-cudnn", "prefill", 16384)
    rest = {key: np.dot(parts_of(*key)[:3], [launch, passes, projections]) for key in cudnn}
    by_cudnn = fitted([parts_of(*key)[3:] for key in cudnn], [*cudnn.values()], [*rest.values()])
    train = measured("train", "train", 32768)
    spent = {key: np.dot(parts_of(*key, True), [launch, passes, projections, *by_cudnn]) for key in train}
    back = [(train[key] - spent[key]) / (2.5 * parts_of(*key, True)[3]) for key in train]
    eager, steps = measured("prefill-flash", "prefill"), measured("train", "train")
    host = [seconds / COUNTS[arm].dispatches[0] for (arm, length), seconds in eager.items() if length == 4096]
    host_steps = [seconds / COUNTS[arm].dispatches[1] for (arm, length), seconds in steps.items() if length < 32768]
    return Rates(
        launch, [statistics.median(host), statistics.median(host_steps)], 1 / passes, FUSED_BYTES, 1 / projections,
        {"flash": 1 / attention, "cudnn": 1 / by_cudnn[0]},
        {"flash": tail / attention, "cudnn": by_cudnn[1] / by_cudnn[0]}, 1 / statistics.median(back),
    )  # fmt: skip


def seconds_of(rates: Rates, arm: str, length: int, suite: str, mode: str, backend: str) -> float:
    """The modelled time of one layer."""
    backward = suite == "train"
    kernels, moved, projections, attention, tiles = parts_of(arm, length, backward)
    passes = rates.fused_passes if arm.endswith("-fused") else rates.passes
    gpu = kernels * rates.launch + moved / passes + projections / rates.projections
    gpu += (attention + rates.tail[backend] * tiles) / rates.attention[backend]
    gpu += backward * 2.5 * attention / rates.attention_back
    return max(gpu, COUNTS[arm].dispatches[backward] * rates.host[backward]) if mode == "eager" else gpu


def predict() -> Prediction:
    rates = fit()
    sources = {"prefill-graph": ("prefill", "graph", "flash"), "prefill-flash": ("prefill", "eager", "flash"),
               "prefill-cudnn": ("prefill", "eager", "cudnn"), "train": ("train", "eager", "cudnn")}  # fmt: skip
    points: list[Point] = []
    worst: dict[str, float] = {}
    worst_of_host: dict[str, float] = {}
    for source, (suite, mode, backend) in [*sources.items(), ("", ("train", "graph", "cudnn"))]:
        known = measured(source, suite) if source else {}
        speeds = measured_speeds(source, suite) if source else {}
        for length in LENGTHS[suite]:
            modelled = {arm: seconds_of(rates, arm, length, suite, mode, backend) for arm in COUNTS}
            own = {arm: known[arm, length] for arm in COUNTS if (arm, length) in known}
            points.append(Point(suite, mode, backend, length, modelled, own, speeds.get(length, {})))
        for (arm, length), seconds in known.items():
            modelled = [seconds_of(rates, arm, length, suite, way, backend) for way in ("graph", mode)]
            kept = worst if modelled[0] == modelled[1] else worst_of_host
            name = f"bench-h100-{source}.json"
            kept[name] = max(kept.get(name, 0.0), abs(modelled[1] / seconds - 1))
    assumed = [f"fused_passes: {FUSED_BYTES:.3g} bytes/s", "kernels and dispatches of each layer, which are counted"]
    files = [f"bench-h100-{name}.json" for name in ("parts", *sources)]
    return Prediction(True, rates, assumed, files, worst, worst_of_host, points)


def read_prediction() -> Prediction:
    return read_result(RESULT, Prediction, "a prediction")


def rounded(value: object) -> object:
    """Numbers to four digits, which fits of other libraries share; measured speeds stay, as tables round them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: item if name == "measured_speed" else rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def table(name: str) -> str:
    """Speed over dense at each length: measured without fused kernels, modelled for the same, predicted with them."""
    rows = [["one layer, H100", "tokens", "measured: `gqe`", "modelled: `gqe`", "predicted: `gqe`, fused",
             "predicted: fused over `dense-fused`"]]  # fmt: skip
    for point in read_prediction().points:
        if point.suite == name:
            modelled = point.modelled
            was = text.times(point.measured_speed["gqe"]) if point.measured_speed else text.DASH
            over = [("dense", "gqe"), ("dense", "gqe-fused"), ("dense-fused", "gqe-fused")]
            speeds = [text.times(modelled[base] / modelled[arm]) for base, arm in over]
            rows.append([f"{point.mode}, {point.backend}", text.length_name(point.length), was, *speeds])
    return markdown(rows)


def filled(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, SCRIPT, table)


def main() -> None:
    write_json(RESULT, rounded(dataclasses.asdict(predict())))
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
