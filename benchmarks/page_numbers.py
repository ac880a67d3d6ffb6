"""Recomputes the numbers in sentences of README.md, docs/ and dev/LOG.md from result files, and puts them back.

    python benchmarks/page_numbers.py

A page marks them: `<!-- numbers: RESULT FUNCTION ARGUMENT ... -->text with numbers<!-- end -->`. RESULT is a file of
benchmarks/results, FUNCTION one of FUNCTIONS. It gives the marked text's numbers in order; words between them are free.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "dev" / "LOG.md")
MARKED = re.compile(r"(<!--\s+numbers:\s+([^>]+?)\s+-->)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)")  # not the digits of names such as float64 or 16k


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def median_ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """The median of ratios, repeat by repeat."""
    return f"{statistics.median(one / other for one, other in zip(first, second, strict=True)):.2f}"


def losses(result: Any) -> dict[tuple[str, int], float]:
    """Final validation loss by arm and seed."""
    return {(run["arm"], run["seed"]): run["validation_loss"] for run in result["runs"]}


def distance_from(result: Any, other: str) -> list[str]:
    """The largest difference between the losses of two comparisons with the same arms and seeds."""
    here, there = losses(result), losses(read(other))
    if here.keys() != there.keys():
        raise ValueError(f"{other} has other runs")
    return [f"{max(abs(here[run] - there[run]) for run in here):.2f}"]


def gqe_behind_static(result: Any) -> list[str]:
    """By how much `gqe` lost to `static`, seed by seed."""
    found = losses(result)
    seeds = sorted({seed for _, seed in found})
    return [f"{found['gqe', seed] - found['static', seed]:.3f}" for seed in seeds]


def differences(result: Any, candidate: str) -> list[float]:
    """`gqe` - `static` in bits per byte for a candidate of the demo, by seed."""
    (found,) = (each["bits_per_byte"] for each in result["candidates"] if each["name"] == candidate)
    return [found["gqe"][seed] - found["static"][seed] for seed in found["static"]]


def reach(result: Any, candidate: str, seeds: str) -> list[str]:
    """How far the 95% interval of their mean over so many seeds reaches to either side."""
    count = int(seeds)
    return [f"{t.ppf(0.975, count - 1) * statistics.stdev(differences(result, candidate)) / count**0.5:.3f}"]


def speed(result: Any, suite: str, arm: str, *lengths: str) -> list[str]:
    """Median speed of an arm over dense at each length of a suite, or at the named lengths."""
    points = [point for point in result["points"] if point["suite"] == suite]
    seconds = [point["seconds"] for point in points if not lengths or str(point["length"]) in lengths]
    return [median_ratio(by_arm["dense"], by_arm[arm]) for by_arm in seconds]


def decode_speed(result: Any, arm: str, batch: str, *lengths: str) -> list[str]:
    """Median speed of an arm over dense in decoding with a static cache, at one batch size."""
    points = [point for point in result["points"] if (point["suite"], point["cache"]) == ("decode", "static")]
    chosen = [point for point in points if str(point["batch"]) == batch and str(point["length"]) in lengths]
    return [median_ratio(point["seconds"]["dense"], point["seconds"][arm]) for point in chosen]


def compiled_speed(result: Any, arm: str, batch: str) -> list[str]:
    """Median speed of a compiled arm over dense in dense's faster mode, at each length of the cache."""
    speeds = []
    for point in result["points"]:
        if str(point["batch"]) == batch:
            dense = min(point["seconds"]["dense"].values(), key=statistics.median)
            speeds.append(median_ratio(dense, point["seconds"][arm]["compiled"]))
    return speeds


def microseconds(result: Any, arm: str, *batches: str) -> list[str]:
    """Of routing within a step and alone, at each batch."""
    steps = [result["steps"][batch][arm] for batch in batches]
    return [f"{1e6 * seconds:.0f}" for step in steps for seconds in (step["stages"]["route"], step["route_alone"])]


def telemetry_share(result: Any, arm: str) -> list[str]:
    """The percentage of training that telemetry takes."""
    spent, whole = (
        statistics.median(result[key][name]) for key, name in (("in_telemetry", arm), ("seconds", "without"))
    )
    return [f"{100 * spent / whole:.1f}"]


def share_of_layer(result: Any, length: str, *stages: str) -> list[str]:
    """Share of a layer's time that the stages take together."""
    (point,) = (p for p in result["points"] if p["suite"] == "parts" and str(p["length"]) == length)
    medians = {stage: statistics.median(seconds) for stage, seconds in point["seconds"].items()}
    return [f"{100 * sum(medians[stage] for stage in stages) / medians['layer']:.1f}"]


def selected_only(result: Any, experts: str) -> list[str]:
    """How many times faster a one-token step is if only the selected experts' queries are projected."""
    (point,) = (p for p in result["points"] if str(p["experts_per_group"]) == experts)
    return [median_ratio(point["seconds"]["all"], point["seconds"]["woken"])]


def faster(result: Any, arm: str, figure: str, *prompt_tokens: str) -> list[str]:
    """How many times as fast as dense an arm serves, for each load or the loads with such a prompt."""
    loads = result["against_dense"][arm]
    kept = [
        name for name in loads if not prompt_tokens or str(result["workloads"][name]["prompt_tokens"]) in prompt_tokens
    ]
    return [f"{1 / loads[name][figure][0]:.2f}" for name in kept]


def ahead(result: Any, case: str, other: str) -> list[str]:
    """By how much a conversion's final loss is below another's: mean over seeds, at equal training."""
    first, second = (
        {run["seed"]: run["validation_loss"] for run in result["runs"] if run["case"] == name} for name in (case, other)
    )
    return [f"{statistics.mean(second[seed] - first[seed] for seed in first):.3f}"]


def below_teacher(result: Any, case: str) -> list[str]:
    """By which share a conversion's final loss is below its teacher's, in percent."""
    runs = [run for run in result["runs"] if run["case"] == case]
    return [f"{100 * statistics.mean(1 - run['validation_loss'] / run['teacher_loss'] for run in runs):.1f}"]


def tokens(result: Any) -> list[str]:
    return [f"{result['tokens']:,}"]


def flipped(result: Any) -> list[str]:
    """Selections that differ between two engines: how many, of how many, and the share in percent."""
    share = result["flipped"] / result["woken_experts"]
    return [str(result["flipped"]), f"{result['woken_experts']:,}", f"{100 * share:.3f}"]


def before_a_flip(result: Any) -> list[str]:
    """Difference of log-probabilities before a text's first difference in routing, and over how many tokens."""
    return [f"{result['difference_before_a_flip']:.4f}", str(result["tokens_before_a_flip"])]


def fixed(result: Any, field: str) -> list[str]:
    return [f"{result[field]:.4f}"]


def loss_by_kernels(result: Any, dtype: str, digits: str, *kernels: str) -> list[str]:
    """Final loss of one run of the demo by the kernels that computed it."""
    found = {run.get("kernels", run.get("instructions")): run for run in result["runs"] if run["dtype"] == dtype}
    return [f"{found[name]['validation_loss']:.{digits}f}" for name in kernels]


def one_loss(result: Any, dtype: str) -> list[str]:
    """The final loss that all runs in one dtype agree on."""
    (loss,) = {run["validation_loss"] for run in result["runs"] if run["dtype"] == dtype}
    return [str(loss)]


def spread_by_kernels(result: Any, dtype: str) -> list[str]:
    """How far the kernels move the final loss."""
    found = [run["validation_loss"] for run in result["runs"] if run["dtype"] == dtype]
    return [f"{max(found) - min(found):.2f}"]


def training_speed(result: Any, kernels: str, *dtypes: str) -> list[str]:
    """Tokens/s in training, by dtype."""
    found = {run["dtype"]: run["tokens_per_s"] for run in result["runs"] if run["kernels"] == kernels}
    return [f"{found[dtype]:,.0f}" for dtype in dtypes]


def farthest_off(result: Any) -> list[str]:
    """The model's largest errors in percent: where the GPU is the limit, and where the host is."""
    return [f"{100 * max(result[name].values()):.0f}" for name in ("worst", "worst_of_host")]


def operators(result: Any, *arm: str) -> list[str]:
    """Aten operators and Triton launches of one layer: prefill, forward and backward, one token."""
    found = [by_arm[", ".join(arm)] for by_arm in result["counts"].values()]
    return [str(sum(count["kernels"].values()) + sum(count["launches"].values())) for count in found]


FUNCTIONS: dict[str, Callable[..., list[str]]] = {
    "ahead": ahead,
    "before-a-flip": before_a_flip,
    "below-teacher": below_teacher,
    "decode-speed": decode_speed,
    "distance-from": distance_from,
    "farthest-off": farthest_off,
    "faster": faster,
    "fixed": fixed,
    "flipped": flipped,
    "gqe-behind-static": gqe_behind_static,
    "loss-by-kernels": loss_by_kernels,
    "compiled-speed": compiled_speed,
    "microseconds": microseconds,
    "one-loss": one_loss,
    "operators": operators,
    "reach": reach,
    "selected-only": selected_only,
    "share-of-layer": share_of_layer,
    "speed": speed,
    "spread-by-kernels": spread_by_kernels,
    "telemetry-share": telemetry_share,
    "tokens": tokens,
    "training-speed": training_speed,
}


def computed(marker: str) -> list[str]:
    """The numbers that a marker stands for, such as `bench-cpu.json speed prefill gqe`."""
    name, function, *arguments = marker.split()
    return FUNCTIONS[function](read(name), *arguments)


def with_numbers_of(text: str, numbers: Sequence[str]) -> str:
    """The text with its numbers replaced in order. Raises ValueError if it has more or fewer of them."""
    if len(NUMBER.findall(text)) != len(numbers):
        raise ValueError(f"{text!r} must hold {len(numbers)} numbers: {', '.join(numbers)}")
    left = iter(numbers)
    return NUMBER.sub(lambda _: next(left), text)


def filled(page: str) -> str:
    """The page with all marked numbers recomputed."""
    return MARKED.sub(lambda found: f"{found[1]}{with_numbers_of(found[3], computed(found[2]))}{found[4]}", page)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
