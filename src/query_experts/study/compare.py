"""The main job: trains the arms on the same tokens, times their prefill, and writes the tables and the page."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import read_json, write_json
from query_experts.common.formatting import plural
from query_experts.data import Corpus, CorpusInfo, prepare
from query_experts.data.tokenizing import load_fast_tokenizer
from query_experts.distributed.ranks import agreed, first_rank
from query_experts.model.arms import ARMS
from query_experts.study.callbacks import StopRequest
from query_experts.study.measure import validation_split
from query_experts.study.prefill import measure_prefill, read_prefill
from query_experts.study.report import print_summary, write_report
from query_experts.study.results import (
    Comparison,
    DataFacts,
    FileFacts,
    RunResult,
    read_result,
    write_comparison,
)
from query_experts.study.settings import CompareSettings, DistillSettings, RunSettings
from query_experts.study.train import stop_after, train_arm, training_split
from query_experts.study.workspace import fingerprint, holds_results, own_folder, refuse_change

SHOWN_KINDS = 5  # of skipped files


def compare(settings: CompareSettings, console: Console) -> bool:
    """Trains what isn't trained yet, times prefill and reports. False if it was stopped by `stop_after_minutes`.

    The report holds every finished run of the folder, whatever arms and seeds this call asks for.
    """
    settings.check()
    with own_folder(Path(settings.out)) as out:
        return compare_in(out, settings, console)


def compare_in(out: Path, settings: CompareSettings, console: Console) -> bool:
    started = time.monotonic()
    stop = stop_after(settings.stop_after_minutes)
    corpus = first_rank(lambda: open_corpus(settings, out, console))
    asked = [(arm, seed) for seed in settings.seeds for arm in settings.arms]  # seed by seed, for paired differences
    for number, (arm, seed) in enumerate(asked, 1):
        folder = run_folder(out, arm, seed)
        if new := agreed(not (folder / "result.json").exists()):
            console.print(f"Run {number} of {len(asked)}: {arm}, seed {seed}")
        run = train_arm(settings, arm, seed, corpus, folder, stop)
        stop.share()
        if run is not None and run.diverged:
            console.print(Text(divergence(settings, run), style="yellow"))
        if new or number == len(asked):
            first_rank(lambda: write_reports(settings, corpus, out) and None)  # so that the page shows them meanwhile
        if run is None or stop.signal is not None:
            return report_stop(settings, stop, console)
    timed = first_rank(lambda: measure_prefill(settings, model_folders(out), out / "prefill.json", stop))
    comparison = first_rank(lambda: write_reports(settings, corpus, out))
    stop.share()
    if not timed:
        return report_stop(settings, stop, console)
    print_summary(comparison, console)
    took = f"({time.monotonic() - started:.0f} s)"
    console.print(Text(f"Page: {out / 'report.html'}   Numbers: {out / 'comparison.json'}   {took}"))
    return True


def report_stop(settings: RunSettings, stop: StopRequest, console: Console) -> bool:
    """Prints that the run stopped, and returns False. Raises SystemExit where a signal asked for the stop."""
    after = f" after {settings.stop_after_minutes:g} minutes" if stop.signal is None else ""
    console.print(f"Stopped{after}; the same command goes on.")
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)
    return False


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm}-seed{seed}"


def write_reports(settings: CompareSettings, corpus: Corpus, out: Path) -> Comparison:
    """Writes the finished runs and prefill times of the folder as comparison.json and as a page."""
    runs = finished_runs(out)
    arms = dict.fromkeys([*settings.arms, *(run.arm for run in runs)])
    seeds = dict.fromkeys([*settings.seeds, *(run.seed for run in runs)])
    comparison = Comparison(
        settings=dataclasses.replace(settings, arms=[*arms], seeds=[*seeds]),
        data=data_facts(settings, corpus),
        environment=environment(settings.torch_device, settings.autocast_dtype()),
        runs=runs,
        prefill=read_prefill(settings, model_folders(out), out / "prefill.json"),
    )
    write_comparison(out / "comparison.json", comparison)
    write_report(comparison, out / "report.html")
    return comparison


def finished_runs(out: Path) -> list[RunResult]:
    """The results in a folder, seed by seed, arms in the study's order."""
    runs = [read_result(path) for path in out.glob("runs/*/result.json")]
    return sorted(runs, key=lambda run: (run.seed, [*ARMS].index(run.arm)))


def model_folders(out: Path) -> dict[str, Path]:
    """The folder of a trained model for each arm: of its first seed that did not diverge."""
    folders: dict[str, Path] = {}
    for run in finished_runs(out):
        if not run.diverged:
            folders.setdefault(run.arm, run_folder(out, run.arm, run.seed) / "model")
    for arm, folder in folders.items():
        if not (folder / "config.json").exists():
            raise SettingError(
                f"out is {out}, where the trained model {folder} of arm {arm} is missing; delete the folder that held "
                "it, and that run is trained again"
            )
    return folders


def divergence(settings: RunSettings, run: RunResult) -> str:
    """The sentence about a run that diverged."""
    sentence = (
        f"learning_rate is {settings.learning_rate}, with which arm {run.arm}, seed {run.seed}, diverged after "
        f"{run.diverged_at_tokens:,} tokens; it must be lower"
    )
    if run.skipped_steps:
        steps = plural(run.skipped_steps, "step")
        sentence += f" (in {steps} gradients weren't finite and were skipped: look at the text of the last ones too)"
    return sentence


def open_corpus(settings: RunSettings, out: Path, console: Console) -> Corpus:
    """The tokenised data of a run folder, after checking that the folder holds no run with other settings or data."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    kept = read_fingerprint(out)
    current = fingerprint(settings)
    if kept is not None:  # before any data is read
        refuse_change({name: value for name, value in kept.items() if name != "data_hash"}, current, out)
    corpus = prepare(
        settings.data or None,
        cache_dir=Path(settings.cache_dir) if settings.cache_dir else out / "cache",
        seq_len=settings.seq_len,
        vocab_size=settings.vocab_size,
        tokenizer=settings.tokenizer,
        max_bytes=settings.max_bytes,
        text_field=settings.text_field,
        validation=settings.validation,
    )
    check_corpus(settings, corpus)
    if kept is None:  # else the tokens' hash tells
        check_given_tokens(settings, corpus)
    current |= {"data_hash": corpus.facts.data_hash}
    if kept is not None:
        refuse_change(kept, current, out)
    else:
        write_json(out / "settings.json", current)
    print_corpus(settings, corpus, console)
    return corpus


def read_fingerprint(out: Path) -> dict[str, Any] | None:
    """The settings that the results in a folder were made with; None where there are no results."""
    marker = out / "settings.json"
    remedy = "nothing else tells with which settings this folder was made; use another"
    return read_json(marker, remedy) if marker.exists() and holds_results(out) else None


def check_corpus(settings: RunSettings, corpus: Corpus) -> None:
    """Raises SettingError where the tokenizer or the text doesn't fit the settings."""
    if corpus.facts.vocab_size > settings.vocab_size:
        raise SettingError(
            f"tokenizer has {corpus.facts.vocab_size} tokens; it must have vocab_size, which is "
            f"{settings.vocab_size}, or fewer"
        )
    if len(corpus.train) < settings.sequences_per_step:
        raise SettingError(
            f"{step_in_words(settings)} is {settings.sequences_per_step}; it must be at most the "
            f"{len(corpus.train)} sequences that data holds"
        )


def check_given_tokens(settings: RunSettings, corpus: Corpus) -> None:
    """Raises SettingError where `data` is a folder of tokens that were made in another way than the settings ask for.

    Tokens that were made of text just now are as the settings ask.
    """
    facts = corpus.facts
    for name in ("max_bytes", "text_field"):
        value, own = getattr(settings, name), getattr(facts, name)
        if name in settings.given and value not in (None, own):
            raise SettingError(
                f"{name} is {value!r}, but data is a folder of tokens, made with "
                f"{'all of the text' if own is None else repr(own)}; it must be left out"
            )
    asked = settings.tokenizer
    if asked is None or (asked == facts.tokenizer != "trained" and not Path(asked).expanduser().exists()):  # on the hub
        return
    if load_fast_tokenizer(asked).get_vocab() != corpus.tokenizer.get_vocab():
        field = "init" if isinstance(settings, DistillSettings) else "tokenizer"
        raise SettingError(
            f"{field} is {asked}, but data is a folder of tokens that another tokenizer made, "
            f"{facts.tokenizer!r}; it must be text, or tokens of this one"
        )


def step_in_words(settings: RunSettings) -> str:
    """The settings that make up the sequences of an optimizer step."""
    if settings.global_batch_size is not None:
        return "global_batch_size"
    ranks = " * processes" if settings.data_parallel_ranks > 1 else ""
    return f"batch_size * gradient_accumulation_steps{ranks}"


def print_corpus(settings: RunSettings, corpus: Corpus, console: Console) -> None:
    facts = corpus.facts
    limit = f" (max_bytes: {facts.max_bytes / 1e6:g} MB)" if facts.max_bytes else ""
    console.print(
        Text(
            f"Data: {', '.join(facts.source)}{limit}: {plural(facts.train_documents, 'document')}, "
            f"{facts.train_tokens:,} tokens to train on, {facts.validation_tokens:,} held out ({held_out(facts)})"
        )
    )
    if settings.validation_sequences is not None and settings.validation_sequences > len(corpus.validation):
        warning = (
            f"validation_sequences is {settings.validation_sequences:,}; data holds out {len(corpus.validation):,}, "
            "and all of them are used"
        )
        console.print(Text(warning, style="yellow"))
    if facts.skipped_files:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in [*facts.skipped_files.items()][:SHOWN_KINDS])
        skipped = plural(sum(facts.skipped_files.values()), "file")
        console.print(Text(f"{skipped} of other kinds in the folders skipped ({kinds})", style="yellow"))


def held_out(facts: CorpusInfo) -> str:
    """What is held out, in words: with validation files, the name and the tokens of each."""
    files = ", ".join(f"{file.name} {file.tokens:,}" for file in facts.validation_files)
    return f"{facts.validation}: {files}" if files else facts.validation


def data_facts(settings: RunSettings, corpus: Corpus) -> DataFacts:
    used = len(validation_split(settings, corpus))
    epochs = settings.steps * settings.sequences_per_step / len(training_split(settings, corpus))
    return DataFacts(
        **vars(corpus.facts)
        | {"validation_files": [FileFacts(**vars(file)) for file in corpus.facts.validation_files]},
        epochs=round(epochs, 3),
        validation_sequences_used=used,
        validation_tokens_used=used * settings.seq_len,
    )
