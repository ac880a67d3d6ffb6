"""Measures what telemetry costs in training at the small preset's size, with one log in 50 steps.

python benchmarks/telemetry_cost.py    # on an idle machine, about 8 minutes; writes results/telemetry-cost.json

Both arms train the gqe arm with ZClip, on random tokens, and take turns; each repeat is 50 steps and their log, after
two steps of warm-up. The model is the preset's; a step has fewer tokens (2 sequences of 256 in place of 16 of 512), so
that ten repeats end in minutes. What telemetry does at a log doesn't depend on a step's tokens, so at the preset's own
step its share is smaller. `in_telemetry` is the time within its callback, which noise of other steps doesn't touch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.common.settings import presets, read_recipe
from query_experts.study.callbacks import ZClipCallback
from query_experts.study.settings import TrainSettings
from query_experts.study.train import new_model, training_arguments
from query_experts.telemetry import Telemetry
from query_experts.training import GQETrainer

RESULT = Path(__file__).resolve().parent / "results" / "telemetry-cost.json"
WARM_UP = 2  # steps
ARMS = ("without", "brief", "detailed")


@dataclass
class TelemetryCost:
    """All of the result file.

    Attributes:
        steps: Steps of a repeat, of which the last is logged.
        tokens_per_step: Tokens of a step.
        seconds: Of each repeat, by arm.
        in_telemetry: Of those, within telemetry's callback.
    """

    steps: int
    tokens_per_step: int
    environment: Environment
    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    in_telemetry: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})

    def share(self, arm: str) -> float:
        """Time within telemetry over the time of a repeat without it, medians."""
        return statistics.median(self.in_telemetry[arm]) / statistics.median(self.seconds["without"])

    def difference(self, arm: str) -> float:
        """Median over repeats of how much longer one took than the repeat without telemetry beside it, minus one."""
        pairs = zip(self.seconds[arm], self.seconds["without"], strict=True)
        return statistics.median(ours / plain for ours, plain in pairs) - 1


class TimedTelemetry(Telemetry):
    """Telemetry that adds up the seconds that a log takes it."""

    spent = 0.0

    def add_to_logs(self, trainer: GQETrainer, logs: dict[str, float]) -> None:
        began = time.perf_counter()
        super().add_to_logs(trainer, logs)
        self.spent += time.perf_counter() - began


class Stopwatch(TrainerCallback):
    """The seconds from the end of the warm-up to the log."""

    began = seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = self.seconds or time.perf_counter() - self.began


class RandomRows(Dataset):
    """Rows of random tokens, the same for all arms."""

    def __init__(self, count: int, seq_len: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocab_size, (count, seq_len), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def settings_of(chosen: argparse.Namespace) -> TrainSettings:
    """Those of the small preset, with the steps and the tokens of a repeat."""
    known = {f.name for f in fields(TrainSettings)}
    preset = TrainSettings(**{k: v for k, v in read_recipe(presets("recipes")["small"]).items() if k in known})
    return replace(
        preset, steps=WARM_UP + chosen.steps, batch_size=chosen.batch_size, seq_len=chosen.seq_len, evaluations=1
    )


def timed(settings: TrainSettings, rows: Dataset, arm: str) -> tuple[float, float]:
    """Seconds of a repeat, and those within telemetry."""
    watch = Stopwatch()
    telemetry = TimedTelemetry(arm == "detailed")
    callbacks = [ZClipCallback(), *([] if arm == "without" else [telemetry]), watch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = replace(
            training_arguments(settings, 0, Path(folder)), logging_steps=settings.steps, eval_strategy="no",
            save_strategy="no",
        )  # fmt: skip
        trainer = GQETrainer(new_model(settings, "gqe", 0), arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.seconds, telemetry.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    settings = settings_of(chosen)
    rows = RandomRows(settings.steps * settings.batch_size, settings.seq_len, settings.vocab_size)
    machine = environment(settings.torch_device, settings.autocast_dtype())
    cost = TelemetryCost(chosen.steps, settings.tokens_per_step, machine)
    for repeat in range(chosen.repeats):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            seconds, spent = timed(settings, rows, arm)
            cost.seconds[arm].append(round(seconds, 4))
            cost.in_telemetry[arm].append(round(spent, 5))
    write_json(chosen.out, asdict(cost))
    for arm in ARMS[1:]:
        Console().print(
            f"{arm}: {cost.share(arm):.2%} of the time is telemetry's own; a repeat takes {cost.difference(arm):+.2%} "
            f"({statistics.median(cost.seconds['without']):.1f} s without)"
        )


if __name__ == "__main__":
    main()
