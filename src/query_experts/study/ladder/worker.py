"""`query-experts scaling run`: takes the ladder's missing runs one after the other and writes their results."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from query_experts.common.device import check_compiler, check_device, peak_flops, resolve_device
from query_experts.common.environment import commit, instructions
from query_experts.common.errors import SettingError
from query_experts.common.files import read_json, require_writable, write_json
from query_experts.common.formatting import plural
from query_experts.data import Corpus
from query_experts.distributed.layout import require_one_process
from query_experts.model.arms import ModelSize
from query_experts.study.callbacks import StopRequest
from query_experts.study.ladder.beside import run_beside
from query_experts.study.ladder.branches import Branch, recorded_settings
from query_experts.study.ladder.callbacks import EndInTime
from query_experts.study.ladder.queue import Queue, Rates
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.settings import Run, ScalingSettings, parameters_without_embeddings
from query_experts.study.ladder.speed import ASSUMED_SHARE, assumed_seconds, speed_text
from query_experts.study.ladder.tokens import open_tokens
from query_experts.study.measure import validation_split
from query_experts.study.settings import RunSettings
from query_experts.study.train import new_model, stop_after

MARGIN = 1.1  # over the predicted time of a run, whose rate varies
FILLING_PARAMETERS = 12_000_000  # a smaller model doesn't fill a GPU, as is assumed until it is measured
MOST_BESIDE = 4  # then each has its own copy of what a process needs on the GPU

ModelKey = tuple[str, ModelSize, bool, bool]  # arm, size, compile, activation_checkpointing


def run_queue(settings: ScalingSettings, console: Console) -> bool:
    """Trains what is missing, in the order of the plan.

    Any number of workers may share `out` and the results: a run is locked while it is trained, and a process that dies
    frees it.

    Returns:
        Whether nothing is left for this device.

    Raises:
        SettingError: A setting, the ladder, its data or its code can't be used.
        SystemExit: After a signal.
    """
    settings.check()
    if settings.hours is not None and settings.minutes is not None:
        raise SettingError(f"hours is {settings.hours} and minutes {settings.minutes}; one of them must be left out")
    check_device(settings.device)
    require_one_process("scaling run")
    queue = read_queue(settings)
    require_places(queue, Path(settings.out))
    queue.results()  # damaged ones are told before any text is tokenised
    require_tag(queue)
    check_compiler(any(queue.ladder.run_settings(run).compile for run in queue.runs), resolve_device(settings.device))
    stop = stop_after(settings.minutes if settings.minutes is not None else settings.hours and 60 * settings.hours)
    corpus = open_tokens(queue, settings, console)
    count = processes(queue, settings)
    settings = dataclasses.replace(settings, beside=count)
    with stop.listening():
        if count == 1:
            Worker.begin(queue, settings, corpus, stop, console).work()
        else:
            console.print(f"{count} processes beside one another.")
            statuses = run_beside(work_beside, (settings, stop.deadline), count, stop)
            for status in {*statuses} - {0}:
                console.print(f"{plural(statuses.count(status), 'process')} ended with status {status}.")
    if stop.signal is not None:
        console.print("Stopped; the same command goes on.")
        raise SystemExit(128 + stop.signal)
    left = len(queue.missing())
    of = f"of {', '.join(settings.only)}" if settings.only else "of this device"
    console.print(Text(f"{plural(left, 'run')} {of} left." if left else f"Every run {of} is done."))
    return left == 0


def read_queue(settings: ScalingSettings) -> Queue:
    """The runs that the settings ask for, on this machine's device. Raises SettingError where no run is for it."""
    device = resolve_device(settings.device)
    queue = Queue.read(Path(settings.ladder), settings.only, device)
    if not queue.runs:
        raise SettingError(
            f"device is {device!r}, for which the chosen runs of {queue.file} have no rung; it must be "
            f"{'cpu' if device == 'cuda' else 'cuda'}, or other runs must be chosen"
        )
    return dataclasses.replace(queue, collect=None if settings.collect is None else Path(settings.collect))


def require_places(queue: Queue, out: Path) -> None:
    """Raises SettingError for a place that can't be written to, before anything is trained."""
    require_writable(out)
    if queue.collect is None:
        require_writable(queue.results_folder, "results")
        return
    if queue.collect.is_dir():
        raise SettingError(f"collect is {queue.collect}, which is a folder; it must be a file")
    require_writable(queue.collect.parent, "the folder of collect")


def processes(queue: Queue, settings: ScalingSettings) -> int:
    """How many processes share the device: as asked, and no more than there are runs; else by the first run's size."""
    missing = [*queue.missing()]
    if not missing:
        return 1
    if settings.beside is not None:
        return min(settings.beside, len(missing))
    first = queue.ladder.run_settings(missing[0])
    if first.torch_device != "cuda":
        return 1
    filling = FILLING_PARAMETERS // parameters_without_embeddings(first.model_size())
    return min(max(1, filling), MOST_BESIDE, len(missing))


def work_beside(settings: ScalingSettings, deadline: float) -> None:
    """The work of one of several processes."""
    queue, stop = read_queue(settings), StopRequest(deadline)
    corpus = open_tokens(queue, settings, Console(quiet=True))
    with stop.listening():
        Worker.begin(queue, settings, corpus, stop, Console()).work()


@dataclass
class Worker:
    """One process at work on a queue.

    Args:
        queue: The ladder's runs and results.
        out: Folder for checkpoints.
        corpus: The ladder's tokens.
        stop: When to save and stop.
        console: Where it says what it does.
        whole_runs: Whether to begin only runs that end before the deadline.
        beside: Processes on the device, this one included.
        models: Arm, size and how it is prepared -> a model, compiled once for all seeds.
        given_up: Rungs that are too slow for the time that is left.
    """

    queue: Queue
    out: Path
    corpus: Corpus
    stop: StopRequest
    console: Console
    whole_runs: bool = False
    beside: int = 1
    models: dict[ModelKey, PreTrainedModel] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)

    @classmethod
    def begin(
        cls, queue: Queue, settings: ScalingSettings, corpus: Corpus, stop: StopRequest, console: Console
    ) -> Worker:
        torch.set_num_threads(queue.ladder.threads)
        whole_runs = settings.minutes is not None
        return cls(queue, Path(settings.out), corpus, stop, console, whole_runs, settings.beside or 1)

    def work(self) -> None:
        """Takes runs until none is free or the stop is asked for."""
        passed: set[Run] = set()
        while not self.stop.made:
            missing = self.queue.missing()
            if not missing:
                return
            rates = self.rates() if self.whole_runs else None
            run = next((r for r in missing if r not in passed and self.fits(r, missing[r], rates)), None)
            if run is None:
                return
            with self.claimed(run) as mine:
                if mine:
                    self.train(run, rates)
                    passed.clear()
                else:
                    passed.add(run)

    @cached_property
    def hardware(self) -> str:
        """What results call this machine's device."""
        return instructions(self.queue.ladder.device(self.queue.runs[0].rung))

    def rates(self) -> Rates:
        """What was measured on a device like this one, with as many processes on it."""
        results = self.queue.results()
        return Rates(self.queue, [r for r in results if (r.instructions, r.beside) == (self.hardware, self.beside)])

    def fits(self, run: Run, budgets: list[float], rates: Rates | None) -> bool:
        """Whether a run may be begun now: at the rates measured so far it ends in time, or nothing is measured."""
        if rates is None:
            return True
        if run.rung in self.given_up:
            return False
        seconds = rates.seconds(run, budgets)
        if seconds is None:
            return True
        known = model_key(run, self.queue.ladder.run_settings(run)) in self.models
        warm_up = 0.0 if known else rates.warm_up(run)
        return MARGIN * seconds + warm_up < self.stop.deadline - time.monotonic()

    @contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Locks a run for this process; whether that succeeded and the run is still missing."""
        with ExitStack() as held:
            try:
                for lock in (run_lock(self.queue, run), folder_lock(self.out, self.queue, run)):
                    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(lock.acquire(timeout=1))  # scaling status holds the first for a moment
            except Timeout:
                yield False
                return
            yield run in self.queue.missing()

    def train(self, run: Run, rates: Rates | None) -> None:
        """Trains the missing budgets of a run, smallest first, and keeps a result of each."""
        folder = run_folder(self.out, self.queue, run)
        self.discard_others(run, folder)
        budgets = self.queue.missing()[run]
        if rates is not None and rates.seconds(run, budgets) is None:
            self.say_what_is_assumed(run)
        for place, budget in enumerate(budgets):
            branch = Branch(self.queue.ladder, self.queue.name, run, budget, folder)
            limit = EndInTime(self.stop.deadline, self.steps_after(branch, budgets[place:]))
            result = branch.train(self.model(branch), self.corpus, self.stop, [limit] if self.whole_runs else [])
            if result is None:
                self.say_why(run, limit)
                return
            result = dataclasses.replace(result, beside=self.beside)
            self.queue.write(result)
            branch.clear()
            self.console.print(Text(f"{run.name}, {budget:.1%}: {loss_text(result)}, {speed_text(result)}"))
        shutil.rmtree(folder, ignore_errors=True)

    def discard_others(self, run: Run, folder: Path) -> None:
        """Removes checkpoints that were made with other settings, tokens or code than the run has now."""
        ladder, marker = self.queue.ladder, folder / "settings.json"
        now = recorded_settings(ladder.run_settings(run), ladder)
        now |= {"budgets": ladder.budgets, "warmup": ladder.warmup, "data_hash": self.corpus.facts.data_hash}
        now |= {"tag": ladder.tag, "commit": ladder.commit}
        kept = read_json(marker, "remove it, and the run begins anew") if marker.exists() else {}
        if folder.exists() and kept != now:
            changed = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
            self.console.print(Text(f"{run.name} was begun with other values of {', '.join(changed)}: it begins anew."))
            shutil.rmtree(folder)
        write_json(marker, now)

    def steps_after(self, branch: Branch, budgets: list[float]) -> float:
        """What a run has to do after a branch, in steps: later budgets, and validation at a third of a step's price."""
        later = self.queue.ladder.share_trained(budgets[1:]) * branch.whole.steps
        validated = len(validation_split(branch.settings, self.corpus)) * len(budgets)
        return later + validated / 3 / branch.settings.sequences_per_step

    def say_what_is_assumed(self, run: Run) -> None:
        """Prints how long a run would take of which nothing is measured, on a device whose peak is known."""
        highest = peak_flops(self.hardware)
        if highest is not None:
            seconds = assumed_seconds(self.queue.ladder, run, highest)
            self.console.print(
                f"{run.name}: nothing of its rung is measured on {self.hardware}; all of it would take {seconds:.0f} s "
                f"at an assumed {ASSUMED_SHARE:.0%} of the peak. Its first steps decide."
            )

    def say_why(self, run: Run, limit: EndInTime) -> None:
        """Prints why a run was given up, where its speed is the reason; its rung is then left out from here on."""
        if limit.needed is None:
            return
        self.given_up.add(run.rung)
        left = max(0.0, self.stop.deadline - time.monotonic())
        self.console.print(
            Text(
                f"{run.name} is given up: by its first steps it needs {limit.needed:.1f} s more, and {left:.1f} s are "
                f"left. No other run of {run.rung} is begun."
            )
        )

    def model(self, branch: Branch) -> PreTrainedModel:
        """A model of the rung and arm, compiled once for all its seeds if the ladder asks for it."""
        key = model_key(branch.run, branch.settings)
        if key not in self.models:
            self.models[key] = new_model(branch.settings, branch.run.arm, branch.run.seed)
        return self.models[key]


def model_key(run: Run, settings: RunSettings) -> ModelKey:
    """What two runs must share to share a model."""
    return run.arm, settings.model_size(), settings.compile, settings.activation_checkpointing


def loss_text(result: LadderResult) -> str:
    """The loss and the speed of a result in words."""
    if result.validation_loss is None:
        return f"diverged after {result.diverged_at_tokens:,} tokens"
    return (
        f"{result.validation_loss:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte, "
        f"{result.train_tokens:,} tokens at {result.tokens_per_s:,.0f} a second"
    )


def run_folder(out: Path, queue: Queue, run: Run) -> Path:
    """Where a run's checkpoints are; ladders with runs of the same name may share `out`."""
    return out / "runs" / queue.name / run.name


def run_lock(queue: Queue, run: Run) -> FileLock:
    """The lock of a run, beside the results, which all workers share."""
    return FileLock(queue.results_folder / ".running" / f"{run.name}.lock")


def folder_lock(out: Path, queue: Queue, run: Run) -> FileLock:
    """The lock of a run's checkpoints, which a ladder of the same name with other results might take too."""
    folder = run_folder(out, queue, run)
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def require_tag(queue: Queue) -> None:
    """Raises SettingError where the code that runs isn't that of the ladder's tag, or a rung has begun with another."""
    tag, wanted, running = queue.ladder.tag, queue.ladder.commit, commit() or "no commit"
    if tag is None or wanted is None:
        return
    if not wanted.startswith(running):
        raise SettingError(
            f"ladder is {queue.file}, whose tag is {tag!r}, commit {wanted}; the code that runs is that of {running} "
            "and must be the tag's, without changes: dev/ladder.sh keeps it beside yours"
        )
    unfinished = {run.rung for run in queue.missing()}
    for result in queue.results():
        if result.rung in unfinished and result.tag != tag:
            raise SettingError(
                f"ladder is {queue.file}, whose tag is {tag!r}; rung {result.rung} has begun with {result.tag!r} and "
                "must be completed with it"
            )
