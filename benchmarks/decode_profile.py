"""Profiles one token of decoding on a CPU, stage by stage, for the layer of each arm over a short static cache.

    python benchmarks/decode_profile.py    # on an idle machine, a minute; writes results/decode-profile.json

A step over a short cache is made of calls, so its time isn't where its FLOPs are. Each stage is timed within whole
steps, by a clock around the function that does it. What no stage holds is `rest`: Python between them. Steps without
clocks are timed as well, and routing by itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from query_experts.bench.models import Layer
from query_experts.bench.settings import BenchSettings
from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.layers import attention

RESULT = Path(__file__).resolve().parent / "results" / "decode-profile.json"
ARMS = ("dense", "static", "gqe")
STAGES = ("route", "project", "rotate", "cache", "attend", "combine", "output projection", "rest")
WARM_UP, BLOCK = 5, 50  # steps; in the second weights are packed


@dataclass(frozen=True)
class Step:
    """A step of one arm.

    Attributes:
        plain: Seconds of a whole step without clocks. All are medians over steps that are timed one by one.
        clocked: Of a whole step with clocks.
        stages: Of each stage, and `rest`.
        route_alone: Of routing called in a loop in which nothing else runs; None without it.
    """

    plain: float
    clocked: float
    stages: dict[str, float]
    route_alone: float | None


@dataclass(frozen=True)
class DecodeProfile:
    """All of the result file. steps: by batch, then by arm."""

    cached: int
    environment: Environment
    steps: dict[int, dict[str, Step]]


def read_profile(file: Path = RESULT) -> DecodeProfile:
    return TypeAdapter(DecodeProfile).validate_json(file.read_bytes())


class Clocks:
    """The seconds that each stage takes in a step. Raises RuntimeError where one runs within another."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.running: str | None = None

    def around(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running is not None:
                raise RuntimeError(f"{stage} runs within {self.running}, and would be counted twice")
            self.running = stage
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[stage] += time.perf_counter() - began
                self.running = None

        return timed


@contextmanager
def clocked(layer: Layer, clocks: Clocks) -> Iterator[None]:
    """Has the layer's stages read the clocks."""
    module: Any = layer.module
    if isinstance(module, attention.GQEAttention):
        places = [
            (module, "route", "route"), (module, "project", "project"), (attention, "rotate", "rotate"),
            (StaticCache, "update", "cache"), (attention, "attend", "attend"), (module, "combine", "combine"),
            (module.o_proj, "forward", "output projection"),
        ]  # fmt: skip
    else:
        projections = [(getattr(module, name), "forward", "project") for name in ("q_proj", "k_proj", "v_proj")]
        places = [
            *projections, (modeling_llama, "apply_rotary_pos_emb", "rotate"), (StaticCache, "update", "cache"),
            (module.o_proj, "forward", "output projection"),
        ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, stage in places:
            stack.enter_context(mock.patch.object(owner, name, clocks.around(getattr(owner, name), stage)))
        if not isinstance(module, attention.GQEAttention):
            backend = module.config._attn_implementation
            attend = clocks.around(ALL_ATTENTION_FUNCTIONS[backend], "attend")
            stack.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {backend: attend}))
        yield


class Arm:
    """Steps of an arm, timed one by one: plain, with clocks, and routing alone, in turn, as a machine's speed drifts.

    Args:
        layer: The arm's layer.
        call: A step.
        route: Routing alone; None without it.
    """

    def __init__(self, layer: Layer, call: Callable[[], object], route: Callable[[], object] | None):
        self.layer, self.call, self.route = layer, call, route
        self.clocks = Clocks()
        self.plain: list[float] = []
        self.whole: list[float] = []
        self.alone: list[float] = []
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def time_block(self) -> None:
        self.plain += seconds_of(self.call)
        with clocked(self.layer, self.clocks):
            for _ in range(BLOCK):
                self.clocks.spent = dict.fromkeys(STAGES, 0.0)
                taken = seconds(self.call)
                self.whole.append(taken)
                self.clocks.spent["rest"] = taken - sum(self.clocks.spent.values())
                for stage, spent in self.clocks.spent.items():
                    self.stages[stage].append(spent)
        if self.route is not None:
            self.alone += seconds_of(self.route)

    def step(self) -> Step:
        stages = {stage: median(spent) for stage, spent in self.stages.items()}
        return Step(median(self.plain), median(self.whole), stages, median(self.alone) if self.alone else None)


def seconds_of(call: Callable[[], object]) -> list[float]:
    """Of a block of calls, after a few to warm up."""
    return [seconds(call) for _ in range(WARM_UP + BLOCK)][WARM_UP:]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median(values: list[float]) -> float:
    return round(statistics.median(values), 7)


def arm_of(name: str, batch: int, cached: int) -> Arm:
    layer = Layer(BenchSettings(device="cpu", kernels="torch"), name, "cpu", cached + 1)
    module, x = layer.module, layer.hidden(batch, 1)
    routed = isinstance(module, attention.GQEAttention) and module.router is not None
    return Arm(layer, layer.cached("static", batch, cached, 1), (lambda: module.route(x)) if routed else None)


@torch.no_grad()
def measure(batch: int, cached: int, steps: int) -> dict[str, Step]:
    arms = {name: arm_of(name, batch, cached) for name in ARMS}
    for _ in range(math.ceil(steps / BLOCK)):
        for arm in arms.values():
            arm.time_block()
    return {name: arm.step() for name, arm in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", type=int, default=16, help="tokens in the cache")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    measured = {batch: measure(batch, chosen.cached, chosen.steps) for batch in chosen.batch_sizes}
    write_json(chosen.out, asdict(DecodeProfile(chosen.cached, environment("cpu", "bfloat16"), measured)))
    for batch, arms in measured.items():
        for arm, step in arms.items():
            stages = ", ".join(f"{stage} {spent * 1e6:.0f}" for stage, spent in step.stages.items() if spent)
            Console().print(f"batch {batch}, {arm}: {step.plain * 1e6:.0f} µs; by stage: {stages}")


if __name__ == "__main__":
    main()
