"""Measures how fast the ladder trains on one thread of this machine: micro-batches, eager and compiled.

python benchmarks/ladder_speed.py    # on an idle machine, some minutes; writes benchmarks/results/ladder-speed.json

A step here is forward, backward and AdamW, as in `compare` before (eager, micro-batches of 4) and in variants. All
variants of a rung and arm take turns. `share` is the rate over that of a large matrix product in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.common.timing import time_interleaved
from query_experts.study.ladder.settings import Run, read_ladder
from query_experts.study.settings import RunSettings
from query_experts.study.train import new_model

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "ladder-speed.json"
PRODUCT = 1024  # rows and columns of the machine's matrix product


@dataclass(frozen=True)
class Speed:
    """One variant of a training step: seconds of each repeat, tokens of a step, active FLOPs of a token."""

    rung: str
    arm: str
    compiled: bool
    micro_batch: int
    seconds: list[float]
    tokens: int
    flops_per_token: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    @property
    def flops_per_s(self) -> float:
        return self.tokens_per_s * self.flops_per_token


@dataclass(frozen=True)
class LadderSpeed:
    """All of the result file. product_flops_per_s: of a float32 matrix product, by repeat."""

    product_flops_per_s: list[float]
    speeds: list[Speed]
    environment: Environment


def step_of(settings: RunSettings, arm: str) -> Callable[[], object]:
    """A training step of a model on random tokens."""
    model = new_model(settings, arm, 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(settings.vocab_size, (settings.batch_size, settings.seq_len))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


def matrix_product() -> Callable[[], object]:
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    return lambda: a @ b


def measure(ladder_file: Path, rungs: list[str], arms: list[str], batches: list[int], repeats: int) -> LadderSpeed:
    ladder = read_ladder(ladder_file)
    torch.set_num_threads(ladder.threads)
    product_seconds: list[float] = []
    speeds = []
    for rung, arm in product(rungs or ladder.rungs, arms):
        run = Run(rung, arm, 0)
        variants = {
            (compiled, batch): replace(ladder.run_settings(run), compile=compiled, batch_size=batch)
            for compiled, batch in product((False, True), batches)
        }
        calls = {f"{key}": step_of(settings, arm) for key, settings in variants.items()}
        seconds = time_interleaved({"product": matrix_product(), **calls}, repeats, "cpu")
        product_seconds += seconds["product"]
        speeds += [
            Speed(
                rung, arm, compiled, batch, seconds[f"{(compiled, batch)}"], batch * settings.seq_len,
                ladder.flops_per_token(run),
            )
            for (compiled, batch), settings in variants.items()
        ]  # fmt: skip
    rates = [2 * PRODUCT**3 / taken for taken in product_seconds]
    return LadderSpeed(rates, speeds, environment("cpu", "float32"))


def print_speed(found: LadderSpeed) -> None:
    best = statistics.median(found.product_flops_per_s)
    table = Table(title=f"{found.environment.hardware}: a matrix product reaches {best / 1e9:.0f} GFLOP/s")
    for heading in ("rung", "arm", "micro-batch", "", "tokens/s", "GFLOP/s", "share"):
        table.add_column(heading)
    for speed in found.speeds:
        table.add_row(
            speed.rung, speed.arm, str(speed.micro_batch), "compiled" if speed.compiled else "eager",
            f"{speed.tokens_per_s:,.0f}", f"{speed.flops_per_s / 1e9:.1f}", f"{speed.flops_per_s / best:.0%}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, default=HERE / "ladder" / "cpu.yaml")
    parser.add_argument("--rungs", nargs="+", default=[])
    parser.add_argument("--arms", nargs="+", default=["dense", "static", "gqe"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    found = measure(chosen.ladder, chosen.rungs, chosen.arms, chosen.batches, chosen.repeats)
    write_json(chosen.out, asdict(found))
    print_speed(found)


if __name__ == "__main__":
    main()
