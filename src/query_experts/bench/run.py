"""Runs a benchmark: checks every arm, times each point of each suite, and writes bench.json after every point."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from query_experts.bench.breakdown import time_parts
from query_experts.bench.correctness import check_layer
from query_experts.bench.models import Layer, Model
from query_experts.bench.report import print_tables, write_plot
from query_experts.bench.results import (
    BenchResult,
    Check,
    PartsResult,
    Point,
    PointResult,
    write_bench,
)
from query_experts.bench.settings import BASELINE, BenchSettings
from query_experts.common.device import has_bfloat16
from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.timing import Call, as_cuda_graph, peak_bytes, time_interleaved
from query_experts.model import costs

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import LlamaConfig

Progress = Callable[[Sequence[Point]], Iterable[Point]]


def bench(settings: BenchSettings, console: Console) -> None:
    """Runs `query-experts bench`: a progress bar, then tables, a plot and the result as one line of JSON.

    Raises:
        SettingError: A setting can't be used, or an arm gives wrong numbers. Nothing is timed then.
    """
    from rich.text import Text

    settings.check()
    if Path(settings.out).exists() and not Path(settings.out).is_dir():
        raise SettingError(f"out is {settings.out}, which is a file; it must be a folder")
    device = settings.torch_device
    if settings.dtype == "bfloat16" and not has_bfloat16(device):
        warning = f"dtype is bfloat16, and by torch's report {device} has no instructions for it; the times mean little"
        console.print(Text(warning, style="yellow"))
    result = run_benchmark(settings, with_progress_bar)
    console.print(f"{len(result.checks)} checks against float64 passed.")
    print_tables(result, console)
    plots = write_plot(result.speed_points(), Path(settings.out))
    console.print(Text("   ".join([f"Numbers: {result_file(settings)}", *(f"Plot: {plot}" for plot in plots[-1:])])))
    print(json.dumps(dataclasses.asdict(result), separators=(",", ":")))


def with_progress_bar(points: Sequence[Point]) -> Iterator[Point]:
    with tqdm(total=len(points), desc="bench", unit="point", dynamic_ncols=True) as bar:
        for point in points:
            bar.set_postfix_str(point.describe())
            yield point
            bar.update()


def run_benchmark(settings: BenchSettings, progress: Progress = iter, refuses_wrong_arms: bool = True) -> BenchResult:
    """Measures everything that the settings ask for and writes bench.json after every point.

    Args:
        settings: What is timed, and where the result goes; already checked.
        progress: Wraps the points, to show how far the benchmark is.
        refuses_wrong_arms: Whether an arm that gives wrong numbers is an error; else its checks in the result say so.

    Raises:
        SettingError: An arm gives wrong numbers, or its attention backend can't run. Nothing is timed then.
    """
    device, out = settings.torch_device, result_file(settings)
    checks = check_correctness(settings, device, refuses_wrong_arms)
    kernels: dict[str, str] = {arm: Layer(settings, arm, device, 1024).kernels for arm in settings.arms}
    result = BenchResult(settings, environment(device, settings.dtype), checks, [], kernels)
    keep_previous_result(out)
    for point in progress(list(points_of(settings))):
        result = dataclasses.replace(result, points=[*result.points, measure(point, settings, device)])
        write_bench(out, result)
    return result


def result_file(settings: BenchSettings) -> Path:
    return Path(settings.out) / "bench.json"


def keep_previous_result(result: Path) -> None:
    """Renames an earlier result, if there is one, to the time at which it was last written."""
    if result.exists():
        written = datetime.fromtimestamp(result.stat().st_mtime)
        result.rename(result.with_name(f"{result.stem}-{written:%Y%m%dT%H%M%S.%f}{result.suffix}"))


def check_correctness(settings: BenchSettings, device: str, refuses_wrong_arms: bool = True) -> list[Check]:
    """Compares every arm with float64, in each way in which the suites call it. Raises SettingError for a wrong arm."""
    arms = dict.fromkeys([*settings.arms, *(["gqe"] if "parts" in settings.suites else [])])
    checks: list[Check] = []
    with backend_errors_as_setting_errors(settings, device):
        for arm in arms:
            checks += check_layer(Layer(settings, arm, device, 1024), arm, settings.suites)
    wrong = next(filter(None, map(wrong_arm, checks)), None)
    if wrong and refuses_wrong_arms:
        raise SettingError(f"{wrong}; nothing is timed")
    return checks


def wrong_arm(check: Check) -> str | None:
    """What is wrong, in a sentence; None where nothing is."""
    if check.passed:
        return None
    return (
        f"arms holds {check.arm}, which is wrong in {check.what}: its error against float64 is {check.error:.3g}; it "
        f"must be at most twice a plain run's, {check.plain:.3g}"
    )


@contextmanager
def backend_errors_as_setting_errors(settings: BenchSettings, device: str) -> Iterator[None]:
    """Names the setting where an attention backend can't run on the device."""
    try:
        yield
    except (ImportError, NotImplementedError) as error:
        raise SettingError(
            f"attn_implementation is {settings.attn_implementation!r}, which can't do what suites asks for on {device} "
            f"({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        if settings.sdpa_backend is None or "No viable backend" not in str(error):
            raise
        raise SettingError(
            f"sdpa_backend is {settings.sdpa_backend!r}, which can't do what suites asks for on {device}; it must be "
            "another, or none"
        ) from error


def points_of(settings: BenchSettings) -> Iterator[Point]:
    for suite in settings.suites:
        match suite:
            case "decode":
                for cache in settings.caches:
                    for batch in settings.batch_sizes:
                        yield from (Point(suite, length, batch, cache) for length in settings.cached_lengths)
            case "chunk":
                yield from (Point(suite, length, 1, "dynamic") for length in settings.cached_lengths)
            case "train" | "model-train":
                yield from (Point(suite, length, settings.train_batch_size) for length in settings.train_lengths)
            case _:
                yield from (Point(suite, length) for length in settings.lengths)


def measure(point: Point, settings: BenchSettings, device: str) -> PointResult | PartsResult:
    """Times all arms at a point, and measures their memory."""
    if point.suite == "parts":
        layer = Layer(settings, "gqe", device, point.length)
        stages = time_parts(layer, point.length, settings.repeats, device)
        return PartsResult(**vars(point), seconds=rounded(stages))
    kind = Model if point.suite.startswith("model") else Layer
    calls: dict[str, Call] = {
        arm: call_of(point, kind(settings, arm, device, point.length + settings.chunk_size), settings)
        for arm in settings.arms
    }
    timed = {arm: as_cuda_graph(call) for arm, call in calls.items()} if settings.cuda_graph else calls
    seconds = time_interleaved(timed, settings.repeats, device)
    del timed  # frees the memory of the graphs before peaks are measured
    return PointResult(
        **vars(point),
        seconds=rounded(seconds),
        peak_bytes={arm: peak_bytes(call, device) for arm, call in calls.items()},
        predicted={arm: round(predicted_speedup(point, arm, settings), 4) for arm in settings.arms},
    )


def rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """To tenths of a microsecond."""
    return {name: [round(value, 7) for value in values] for name, values in seconds.items()}


def call_of(point: Point, timed: Layer | Model, settings: BenchSettings) -> Call:
    """The call that is timed at a point."""
    match point.suite:
        case "prefill" | "model":
            return timed.prefill(point.batch, point.length)
        case "train" | "model-train":
            return timed.train(point.batch, point.length)
    assert isinstance(timed, Layer)
    assert point.cache is not None
    new = settings.chunk_size if point.suite == "chunk" else 1
    cached = point.length - settings.chunk_size if point.suite == "chunk" else point.length
    return timed.cached(point.cache, point.batch, cached, new)


def predicted_speedup(point: Point, arm: str, settings: BenchSettings) -> float:
    """The baseline's work over the arm's: bytes in decoding, which memory limits, and FLOPs elsewhere."""
    baseline, own = (work_of(point, settings.config(name, point.length), settings) for name in (BASELINE, arm))
    return baseline.bytes / own.bytes if point.suite == "decode" else baseline.flops / own.flops


def work_of(point: Point, config: LlamaConfig, settings: BenchSettings) -> costs.Work:
    """What the call of a point computes and reads, of one layer or of the whole model."""
    match point.suite:
        case "prefill":
            return costs.layer_work(config, point.batch, point.length)
        case "train":
            return costs.layer_work(config, point.batch, point.length, backward=True)
        case "chunk":
            cached = point.length - settings.chunk_size
            return costs.layer_work(config, point.batch, settings.chunk_size, cached)
        case "decode":
            size = settings.torch_dtype.itemsize
            return costs.layer_work(config, point.batch, 1, point.length, bytes_per_value=size)
    return costs.model_work(config, point.batch, point.length, backward=point.suite == "model-train")
