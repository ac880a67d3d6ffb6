"""`query-experts bench`: the gate, then each suite's points, one after the other, kept as they come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

from query_experts.bench.breakdown import time_parts
from query_experts.bench.correctness import Check, check_layer
from query_experts.bench.models import Layer, Model
from query_experts.bench.report import print_tables, write_plot
from query_experts.bench.settings import BenchSettings
from query_experts.common.device import has_bfloat16, resolve_device
from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import write_json
from query_experts.common.timing import as_cuda_graph, peak_bytes, time_interleaved
from query_experts.model import costs


@dataclasses.dataclass(frozen=True)
class Point:
    """One place at which all arms are timed."""

    suite: str
    length: int  # of the prompt or the training sequence, or cached tokens
    batch: int = 1
    cache: str | None = None

    def describe(self) -> str:
        return f"{self.suite} {self.length}" + (f", batch {self.batch}, {self.cache} cache" if self.cache else "")


def bench(settings: BenchSettings, console: Console) -> None:
    """Measure everything that the settings ask for; the result is written after every point.

    Raises SettingError where an arm gives wrong numbers: no speed is measured then.
    """
    settings.check()
    device = resolve_device(settings.device)
    out = Path(settings.out) / "bench.json"
    if settings.dtype == "bfloat16" and not has_bfloat16(device):
        told = f"dtype is bfloat16, for which {device} has no instructions as far as torch tells: times say little then"
        console.print(Text(told, style="yellow"))
    checks = gate(settings, device)
    result: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "environment": environment(device, settings.dtype),
        "checks": [dataclasses.asdict(check) for check in checks],
        "points": [],
    }
    points = list(points_of(settings))
    keep_previous_result(out)
    with tqdm(total=len(points), desc="bench", unit="point", dynamic_ncols=True) as bar:
        for point in points:
            bar.set_postfix_str(point.describe())
            result["points"].append(measure(point, settings, device))
            write_json(out, result)
            bar.update()
    console.print(f"{len(checks)} checks against float64 passed.")
    print_tables(result, console)
    plots = write_plot(result, Path(settings.out))
    console.print(Text("   ".join([f"Numbers: {out}", *(f"Plot: {plot}" for plot in plots[-1:])])))
    print(json.dumps(result, separators=(",", ":")))


def keep_previous_result(result: Path) -> None:
    """An earlier result stays, under the time at which it was last written."""
    if result.exists():
        written = datetime.fromtimestamp(result.stat().st_mtime)
        result.rename(result.with_name(f"{result.stem}-{written:%Y%m%dT%H%M%S.%f}{result.suffix}"))


def gate(settings: BenchSettings, device: str) -> list[Check]:
    arms = dict.fromkeys([*settings.arms, *(["gqe"] if "parts" in settings.suites else [])])
    try:
        checks = [
            check for arm in arms for check in check_layer(Layer(settings, arm, device, 1024), arm, settings.suites)
        ]
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
    for check in checks:
        if not check.passed:
            raise SettingError(
                f"arms holds {check.arm}, which is wrong in {check.what}: it errs by "
                f"{check.error:.3g} against float64, where at most twice a plain "
                f"run's {check.plain:.3g} is allowed; nothing is timed"
            )
    return checks


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
                yield from (Point(suite, length) for length in settings.train_lengths)
            case _:
                yield from (Point(suite, length) for length in settings.lengths)


def measure(point: Point, settings: BenchSettings, device: str) -> dict[str, Any]:
    """Seconds of every repeat for each arm, peak bytes, and the speedup over dense that costs.py predicts."""
    held = dataclasses.asdict(point)
    if point.suite == "parts":
        layer = Layer(settings, "gqe", device, point.length)
        return held | {"seconds": time_parts(layer, point.length, settings.repeats, device)}
    kind = Model if point.suite.startswith("model") else Layer
    calls = {
        arm: call_of(point, kind(settings, arm, device, point.length + settings.chunk_size), settings)
        for arm in settings.arms
    }
    timed = {arm: as_cuda_graph(call) for arm, call in calls.items()} if settings.cuda_graph else calls
    seconds = time_interleaved(timed, settings.repeats, device)
    del timed  # and with it what the graphs hold
    peaks = {arm: peak_bytes(call, device) for arm, call in calls.items()}
    return held | {
        "seconds": {arm: [round(s, 7) for s in times] for arm, times in seconds.items()},
        "peak_bytes": peaks,
        "predicted": {arm: round(predicted(point, arm, settings), 4) for arm in settings.arms},
    }


def call_of(point: Point, subject: Any, settings: BenchSettings) -> Callable[[], Any]:
    match point.suite:
        case "prefill" | "model":
            return subject.prefill(point.batch, point.length)
        case "train" | "model-train":
            return subject.train(point.batch, point.length)
        case "chunk":
            return subject.cached(point.cache, point.batch, point.length - settings.chunk_size, settings.chunk_size)
        case "decode":
            return subject.cached(point.cache, point.batch, point.length, 1)
    raise ValueError(point.suite)


def predicted(point: Point, arm: str, settings: BenchSettings) -> float:
    """Dense's work over the arm's: bytes in decoding, which waits for memory, and FLOPs elsewhere."""
    size = settings.torch_dtype.itemsize

    def work(name: str) -> costs.Work:
        config, batch = settings.config(name, point.length), point.batch
        match point.suite:
            case "prefill":
                return costs.layer_work(config, batch, point.length)
            case "train":
                return costs.layer_work(config, batch, point.length, backward=True)
            case "chunk":
                cached = point.length - settings.chunk_size
                return costs.layer_work(config, batch, settings.chunk_size, cached)
            case "decode":
                return costs.layer_work(config, batch, 1, point.length, bytes_per_value=size)
        return costs.model_work(config, batch, point.length, backward=point.suite == "model-train")

    dense, ours = work("dense"), work(arm)
    return dense.bytes / ours.bytes if point.suite == "decode" else dense.flops / ours.flops
