"""`query-experts scaling run`: takes the ladder's missing runs one after the other and writes their results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from query_experts.common.device import check_device, require_one_process, resolve_device
from query_experts.common.environment import commit
from query_experts.common.errors import SettingError
from query_experts.common.files import write_json
from query_experts.common.formatting import plural
from query_experts.data import Corpus, prepare
from query_experts.study.callbacks import StopRequest
from query_experts.study.compare import check_corpus, print_corpus
from query_experts.study.ladder.branches import Branch, recorded_settings
from query_experts.study.ladder.queue import Queue, Rates
from query_experts.study.ladder.results import LadderResult, write_result
from query_experts.study.ladder.settings import Run, ScalingSettings
from query_experts.study.train import new_model, stop_after

MOST_EPOCHS = 4


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
    check_device(settings.device)
    require_one_process()
    queue = Queue.read(Path(settings.ladder), settings.only, resolve_device(settings.device))
    require_tag(queue)
    torch.set_num_threads(queue.ladder.threads)
    stop = stop_after(settings.minutes if settings.minutes is not None else settings.hours and 60 * settings.hours)
    worker = Worker(queue, Path(settings.out), open_tokens(queue, settings, console), stop, console)
    with stop.listening():
        worker.work(whole_runs=settings.minutes is not None)
    if stop.signal is not None:
        console.print("Stopped; the same command goes on.")
        raise SystemExit(128 + stop.signal)
    left = len(queue.missing())
    console.print(f"{plural(left, 'run')} of this device left." if left else "Every run of this device is done.")
    return left == 0


@dataclass
class Worker:
    """One process at work on a queue.

    Args:
        queue: The ladder's runs and results.
        out: Folder for checkpoints.
        corpus: The ladder's tokens.
        stop: When to save and stop.
        console: Where it says what it does.
    """

    queue: Queue
    out: Path
    corpus: Corpus
    stop: StopRequest
    console: Console
    models: dict[tuple[str, str], PreTrainedModel] = field(default_factory=dict)

    def work(self, whole_runs: bool) -> None:
        """Takes runs until none is free or the stop is asked for.

        Args:
            whole_runs: Whether to begin only runs that end before the deadline, at the rate measured so far.
        """
        passed: set[Run] = set()
        while not self.stop.made:
            missing = self.queue.missing()
            free = [run for run in missing if run not in passed and self.fits(run, missing[run], whole_runs)]
            if not free:
                return
            with self.claimed(free[0]) as mine:
                if mine:
                    self.train(free[0])
                    passed.clear()
                else:
                    passed.add(free[0])

    def fits(self, run: Run, budgets: list[float], whole_runs: bool) -> bool:
        """Whether a run may be begun now."""
        seconds = Rates(self.queue, self.queue.results()).seconds(run, budgets) if whole_runs else None
        return seconds is None or seconds < self.stop.deadline - time.monotonic()

    @contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Locks a run for this process; whether that succeeded and the run is still missing."""
        lock = run_lock(self.out, run)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield run in self.queue.missing()
        finally:
            lock.release()

    def train(self, run: Run) -> None:
        """Trains the missing budgets of a run, smallest first, and writes a result for each."""
        folder = run_folder(self.out, run)
        self.discard_others(run, folder)
        for budget in self.queue.missing()[run]:
            branch = Branch(self.queue.ladder, self.queue.name, run, budget, folder)
            result = branch.train(self.model(branch), self.corpus, self.stop)
            if result is None:
                return
            write_result(self.queue.results_folder, result)
            self.console.print(Text(f"{run.name}, {budget:.1%}: {loss_text(result)}"))
        shutil.rmtree(folder, ignore_errors=True)

    def discard_others(self, run: Run, folder: Path) -> None:
        """Removes checkpoints that were made with other settings, tokens or code than the run has now."""
        ladder, marker = self.queue.ladder, folder / "settings.json"
        now = recorded_settings(ladder.run_settings(run), ladder)
        now |= {"data_hash": self.corpus.facts.data_hash, "tag": ladder.tag}
        kept = json.loads(marker.read_text()) if marker.exists() else {}
        if folder.exists() and kept != now:
            changed = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
            self.console.print(Text(f"{run.name} was begun with other values of {', '.join(changed)}: it begins anew."))
            shutil.rmtree(folder)
        write_json(marker, now)

    def model(self, branch: Branch) -> PreTrainedModel:
        """A model of the rung and arm, compiled once for all its seeds if the ladder asks for it."""
        key = branch.run.rung, branch.run.arm
        if key not in self.models:
            self.models[key] = new_model(branch.settings, branch.run.arm, branch.run.seed)
        return self.models[key]


def loss_text(result: LadderResult) -> str:
    """The loss and the speed of a result in words."""
    if result.validation_loss is None:
        return f"diverged after {result.diverged_at_tokens:,} tokens"
    return (
        f"{result.validation_loss:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte, "
        f"{result.train_tokens:,} tokens at {result.tokens_per_s:,.0f} a second"
    )


def run_folder(out: Path, run: Run) -> Path:
    return out / "runs" / run.name


def run_lock(out: Path, run: Run) -> FileLock:
    """The lock of a run, beside its folder. Creates that one's parent."""
    folder = run_folder(out, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
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


def open_tokens(queue: Queue, settings: ScalingSettings, console: Console) -> Corpus:
    """The ladder's tokens: made from the text files once, found in `out` afterwards.

    Raises SettingError where they are missing, have another hash than the ladder says, or are too few for its runs.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ladder = queue.ladder
    shared = ladder.run_settings(ladder.runs()[0])
    data, validation = text_files(queue, settings)
    corpus = prepare(
        data, validation=validation, cache_dir=tokens_folder(settings), seq_len=shared.seq_len,
        vocab_size=shared.vocab_size, tokenizer=shared.tokenizer, text_field=shared.text_field,
    )  # fmt: skip
    if ladder.data_hash not in (None, corpus.facts.data_hash):
        raise SettingError(
            f"data has tokens with the hash {corpus.facts.data_hash}; ladder {queue.file} has data_hash "
            f"{ladder.data_hash}: they must be the same"
        )
    check_corpus(shared, corpus)
    print_corpus(shared, corpus, console)
    for run in queue.runs:
        whole = ladder.run_settings(run)
        epochs = whole.steps * whole.sequences_per_step / len(corpus.train)
        if epochs > MOST_EPOCHS:
            raise SettingError(
                f"data has {corpus.facts.train_tokens:,} tokens, of which rung {run.rung} would train {epochs:.1f} "
                f"epochs; it must be {MOST_EPOCHS} at most: give more text, or fewer tokens_per_parameter"
            )
    return corpus


def tokens_folder(settings: ScalingSettings) -> Path:
    return Path(settings.out) / "tokens"


def text_files(queue: Queue, settings: ScalingSettings) -> tuple[list[str], list[str]]:
    """The files to train on and to validate on; or one folder of tokens, and nothing.

    Raises SettingError where `data` isn't given and `out` doesn't hold one folder of tokens.
    """
    if settings.data is not None and not (Path(settings.data) / "meta.json").exists():
        folder, ladder = Path(settings.data), queue.ladder
        return [str(folder / name) for name in ladder.data], [str(folder / name) for name in ladder.validation]
    kept = [Path(settings.data)] if settings.data is not None else sorted(tokens_folder(settings).glob("corpus-*"))
    if len(kept) != 1:
        raise SettingError(
            f"data isn't given, and out holds {plural(len(kept), 'folder')} of tokens in {tokens_folder(settings)}; "
            "data must be the folder of the text files, or one of tokens"
        )
    return [str(kept[0])], []
