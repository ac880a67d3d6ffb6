"""Fills the tables of speed in docs/ from benchmarks/results/, and draws their plots into docs/plots/.

python benchmarks/performance_tables.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig

import decode_compiled
import decode_profile
import sparse_projection
from page_tables import markdown, with_tables
from query_experts import GQEConfig
from query_experts.bench.report import write_plot
from query_experts.bench.results import (
    LAYER,
    BenchResult,
    PointResult,
    Spread,
    read_bench,
    spread_of_ratios,
)
from query_experts.bench.settings import BASELINE, FUSED_BASELINE
from query_experts.common import formatting as text
from query_experts.model import costs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "plots"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "performance.md")
SCRIPT = "benchmarks/performance_tables.py"  # in the markers of its tables
SUITES = {  # table -> its suite, and the result files that hold it
    "prefill": ("prefill", "bench-cpu"),
    "chunk": ("chunk", "bench-cpu"),
    "train": ("train", "bench-cpu"),
    "decode": ("decode", "bench-cpu-decode"),
    "decode-short": ("decode", "bench-cpu-decode-short"),
    "wide": ("prefill", "bench-cpu-wide"),
    "model": ("model", "bench-cpu-model", "bench-cpu-model-long"),
    "gpu-prefill": ("prefill", "bench-h100-prefill-flash"),
    "gpu-prefill-graph": ("prefill", "bench-h100-prefill-graph"),
    "gpu-prefill-cudnn": ("prefill", "bench-h100-prefill-cudnn"),
    "gpu-prefill-flex": ("prefill", "bench-h100-prefill-flex"),
    "gpu-wide": ("prefill", "bench-h100-wide"),
    "gpu-chunk": ("chunk", "bench-h100-chunk"),
    "gpu-train": ("train", "bench-h100-train"),
    "gpu-model": ("model", "bench-h100-model"),
    "gpu-model-train": ("model-train", "bench-h100-model"),
    "gpu-decode": ("decode", "bench-h100-decode-fused"),
}
CPU_PLOT = "bench-cpu"
GPU_PLOT = ("bench-h100-prefill-flash", "bench-h100-train", "bench-h100-model", "bench-h100-decode-fused")
GPU_PLOT_SUITES = ("prefill", "train", "model", "decode")
PARTS, GPU_PARTS = "bench-cpu", "bench-h100-parts"
GPU_DECODE = {
    "eager": "bench-h100-decode",
    "graph": "bench-h100-decode-graph",
    "graph, first kernel": "bench-h100-decode-fused",
}
LENGTHS = [2048, 8192, 32768, 131072]
WORTHWHILE = 1.1  # the speedup from which a length counts as faster


class Shape(NamedTuple):
    """The shape of a model, as its published configuration gives it."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "the paper's 250M": Shape(1024, 16, 8, 64, 2816, 16, 32_000, False),
    "SmolLM2-360M": Shape(960, 15, 5, 64, 2560, 32, 49_152, True),
    "Qwen3-0.6B": Shape(1024, 16, 8, 128, 3072, 28, 151_936, True),
    "Llama-3.2-1B": Shape(2048, 32, 8, 64, 8192, 16, 128_256, True),
    "Llama-3.1-8B": Shape(4096, 32, 8, 128, 14_336, 32, 128_256, False),
}


def result(name: str) -> BenchResult:
    return read_bench(RESULTS / f"{name}.json")


def with_range(speed: Spread) -> str:
    return f"{text.times(speed.median)} ({speed.low:.2f} to {speed.high:.2f})"


def speeds(suite: str, *names: str) -> str:
    """A row for each point and arm: time, speed relative to dense, predicted speed, share of it, peak memory.

    Speed relative to dense-fused too, where that was timed.
    """
    points = [point for name in names for point in result(name).speed_points(suite)]
    fused = any(FUSED_BASELINE in point.seconds for point in points)
    over_fused = ["over `dense-fused`"] if fused else []
    rows = [
        ["tokens", "arm", "time", "speed (range of repeats)", *over_fused, "predicted", "share of it", "peak memory"]
    ]
    for point in points:
        for arm, seconds in point.seconds.items():
            place = place_of(point) if arm == BASELINE else ""
            time, peak = text.duration(statistics.median(seconds)), f"{text.short(point.peak_bytes[arm])}B"
            speed, *predicted = speed_cells(point, arm)
            over = point.speedup_over_fused(arm)
            against = [text.DASH if over is None else with_range(over)] if fused else []
            rows.append([place, f"`{arm}`", time, speed, *against, *predicted, peak])
    return markdown(rows)


def place_of(point: PointResult) -> str:
    length = text.length_name(point.length)
    if point.suite == "decode":
        return f"{length}, batch {point.batch}, {point.cache} cache"
    return f"{length}, batch {point.batch}" if point.batch > 1 else length


def speed_cells(point: PointResult, arm: str) -> list[str]:
    if arm == BASELINE:
        return [text.DASH] * 3
    speed, predicted = point.speedup(arm), point.predicted[arm]
    return [with_range(speed), text.times(predicted), f"{speed.median / predicted:.0%}"]


def parts(name: str) -> str:
    """Median time of each stage of the gqe layer and its share of the whole layer."""
    points = result(name).parts_points()
    rows = [["stage", *(f"{text.length_name(point.length)} tokens" for point in points)]]
    for stage in points[0].seconds:
        cells = []
        for point in points:
            median, whole = (statistics.median(point.seconds[name]) for name in (stage, LAYER))
            cells.append(f"{text.duration(median)} ({median / whole:.1%})")
        rows.append([stage, *cells])
    return markdown(rows)


def gpu_decode_ways() -> str:
    """Speed of `gqe` relative to dense in decoding: eager, as a CUDA graph, and as one with the first Triton kernel."""
    rows = [["cached tokens", "batch", *GPU_DECODE]]
    for points in zip(*(result(name).speed_points() for name in GPU_DECODE.values()), strict=True):
        cells = [with_range(point.speedup("gqe")) for point in points]
        rows.append([text.length_name(points[0].length), str(points[0].batch), *cells])
    return markdown(rows)


def shapes() -> str:
    """The speedup of whole models of known shapes by FLOPs, and the length from which prefill is a tenth faster."""
    lengths = [f"{text.length_name(length)} tokens" for length in LENGTHS]
    rows = [["shape", "N/(kG+1)", *lengths, f"{WORTHWHILE:.1f}{text.TIMES} from"]]
    for name, shape in SHAPES.items():
        dense, gqe = LlamaConfig(**shape._asdict()), GQEConfig(**shape._asdict())
        first = next(n for n in (2**power for power in range(8, 24)) if flops_ratio(dense, gqe, n) >= WORTHWHILE)
        speedups = [costs.attention_limit(gqe, dense), *(flops_ratio(dense, gqe, length) for length in LENGTHS)]
        rows.append([name, *map(text.times, speedups), f"{text.length_name(first)} tokens"])
    return markdown(rows)


def flops_ratio(dense: LlamaConfig, gqe: GQEConfig, length: int) -> float:
    return costs.model_work(dense, 1, length).flops / costs.model_work(gqe, 1, length).flops


def where() -> str:
    """Hardware, versions and repeats of each result file."""
    rows = [["file", "hardware", "torch", "Transformers", "repeats", "date"]]
    files = {file for _, *files in SUITES.values() for file in files}
    for name in sorted({*files, *GPU_DECODE.values(), GPU_PARTS}):
        bench = result(name)
        ran_in = bench.environment
        link = f"[{name}.json](../benchmarks/results/{name}.json)"
        versions = [ran_in.hardware, ran_in.torch, ran_in.transformers]
        rows.append([link, *versions, str(bench.settings.repeats), ran_in.date])
    return markdown(rows)


def selected_only() -> str:
    """The speed of a one-token step that projects only the selected experts."""
    rows = [["experts in a group", "times as fast (range of repeats)", "the same over dense"]]
    for point in sparse_projection.read_sparse_projection().points:
        own = point.seconds[sparse_projection.SELECTED_ONLY]
        others = (point.seconds[sparse_projection.ALL], point.seconds[BASELINE])
        rows.append([str(point.experts_per_group), *(with_range(spread_of_ratios(other, own)) for other in others)])
    return markdown(rows)


def profiled() -> str:
    """Median microseconds of each stage of a step over a short cache, by batch and arm."""
    batches = decode_profile.read_profile().steps
    columns = [(batch, arm, step) for batch, arms in batches.items() for arm, step in arms.items()]
    rows = [["stage, µs", *(f"`{arm}`, batch {batch}" for batch, arm, _ in columns)]]
    for stage in decode_profile.STAGES:
        spent = [step.stages[stage] for *_, step in columns]
        rows.append([stage, *(f"{1e6 * seconds:.0f}" if seconds else text.DASH for seconds in spent)])
    rows.append(["step", *(f"{1e6 * step.clocked:.0f}" for *_, step in columns)])
    rows.append(["step without clocks", *(f"{1e6 * step.plain:.0f}" for *_, step in columns)])
    return markdown(rows)


def compiled() -> str:
    """A step of each arm, eager and compiled: median times, and speed over dense in dense's faster mode."""
    modes, arms = decode_compiled.MODES, decode_compiled.ARMS
    times = [f"`{arm}`, {mode}" for arm in arms for mode in modes]
    speed = [f"speed of `gqe`, {mode} (range of repeats)" for mode in modes]
    rows = [["cached tokens", *times, *speed]]
    for point in decode_compiled.read_decode_compiled().points:
        place = f"{text.length_name(point.cached)}, batch {point.batch}"
        medians = [text.duration(statistics.median(point.seconds[arm][mode])) for arm in arms for mode in modes]
        rows.append([place, *medians, *(with_range(point.speed("gqe", mode)) for mode in modes)])
    return markdown(rows)


TABLES = {
    "decode-compiled": compiled,
    "decode-profile": profiled,
    "parts": lambda: parts(PARTS),
    "gpu-parts": lambda: parts(GPU_PARTS),
    "gpu-decode-ways": gpu_decode_ways,
    "shapes": shapes,
    "where": where,
    "selected-only": selected_only,
}


def table(name: str) -> str:
    return TABLES[name]() if name in TABLES else speeds(*SUITES[name])


def filled(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, SCRIPT, table)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    write_plot(result(CPU_PLOT).speed_points(), PLOTS)
    points = [point for name in GPU_PLOT for point in result(name).speed_points(*GPU_PLOT_SUITES)]
    write_plot(points, PLOTS, "bench-h100")


if __name__ == "__main__":
    main()
