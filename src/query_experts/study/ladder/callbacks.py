"""Trainer callbacks of a branch: routing along the run, the end of the stable part, and how far the run is."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from query_experts.common.files import write_json
from query_experts.study.measure import is_routed, routing_load
from query_experts.study.results import RoutingPoint

PROGRESS = "progress.json"


class RoutingCurve(TrainerCallback):
    """Measures how the routers distribute held-out tokens, along the run.

    What it measures stands in the Trainer's log, which checkpoints keep.

    Args:
        every: Steps between two measurements.
        tokens_per_step: Tokens of a step.
        sample: Held-out sequences.
    """

    def __init__(self, every: int, tokens_per_step: int, sample: Subset):
        self.every = every
        self.tokens_per_step = tokens_per_step
        self.sample = sample

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step % self.every or not is_routed(model):
            return
        training = model.training
        load = routing_load(model, self.sample)
        model.train(training)
        if not math.isfinite(load.mean_entropy):  # the run has diverged, as its next loss will show
            return
        point = {
            "tokens": state.global_step * self.tokens_per_step,
            "entropy": round(load.mean_entropy, 5),
            "entropy_lowest": min(value for layer in load.entropy for value in layer),
            "highest_load": load.highest_load,
            "dead": load.dead,
        }
        state.log_history.append({"step": state.global_step, "routing": point})

    @staticmethod
    def points(log_history: list[dict[str, Any]]) -> list[RoutingPoint]:
        return [RoutingPoint(**log["routing"]) for log in log_history if "routing" in log]


class KeepFork(TrainerCallback):
    """Keeps the checkpoint of one step, from which larger budgets go on.

    Args:
        step: The last step of the stable part.
        folder: Where the checkpoint is kept, under its own name.
    """

    def __init__(self, step: int, folder: Path):
        self.step = step
        self.folder = folder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.keep(args, state)  # a kill may have come between the checkpoint and its copy

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.keep(args, state)

    def keep(self, args: TrainingArguments, state: TrainerState) -> None:
        name = f"checkpoint-{self.step}"
        checkpoint, kept = Path(str(args.output_dir)) / name, self.folder / name
        if state.global_step != self.step or kept.exists() or not checkpoint.exists():
            return
        copy = self.folder / f"copying-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        copy.rename(kept)


@dataclass(frozen=True)
class Progress:
    """How far a run is: its budget, and the last step of the budget's branch that was logged."""

    budget: float
    step: int


class ProgressFile(TrainerCallback):
    """Writes how far a run is, for `scaling status`.

    Args:
        folder: The run's folder.
        budget: That of the branch.
    """

    def __init__(self, folder: Path, budget: float):
        self.folder = folder
        self.budget = budget

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        write_json(self.folder / PROGRESS, asdict(Progress(self.budget, state.global_step)))


class EndInTime(TrainerCallback):
    """Stops a run that would end after a deadline, as soon as its own steps show it.

    The median time between two steps counts, so a pause for compiling or measuring doesn't. `needed` is then the
    seconds that the run would have taken from there, and None before.

    Args:
        deadline: On the clock of `time.monotonic`.
        steps_after: What follows the last step, as a number of steps.
    """

    PASSED = 2  # steps in which a process warms up
    JUDGED = 5  # the fewest steps that show a rate
    KEPT = 51

    def __init__(self, deadline: float, steps_after: float):
        self.deadline = deadline
        self.steps_after = steps_after
        self.needed: float | None = None
        self.passed = 0
        self.ended: float | None = None
        self.intervals: deque[float] = deque(maxlen=self.KEPT)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if self.ended is not None and self.passed >= self.PASSED:
            self.intervals.append(now - self.ended)
        self.ended = now
        self.passed += 1
        if len(self.intervals) < self.JUDGED or state.global_step >= state.max_steps:
            return
        left = statistics.median(self.intervals) * (state.max_steps - state.global_step + self.steps_after)
        if now + left > self.deadline:
            self.needed = left
            control.should_training_stop = True
