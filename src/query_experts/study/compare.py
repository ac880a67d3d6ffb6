"""The main job: train the arms head to head, time their prefill, and write the table and the page."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from query_experts.data import Corpus, prepare
from query_experts.errors import SettingError
from query_experts.files import write_json
from query_experts.study.environment import environment
from query_experts.study.prefill import measure_prefill
from query_experts.study.report import print_summary, verdict, write_report
from query_experts.study.run import deadline_after, train_arm
from query_experts.study.settings import (
    CompareSettings,
    RunSettings,
    TrainSettings,
    fingerprint,
    refuse_change,
    resolve_device,
)


def compare(settings: CompareSettings, console: Console) -> bool:
    """Train what isn't trained yet, measure, report. False if `stop_after_minutes` cut it off."""
    settings.check()
    started = time.monotonic()
    deadline = deadline_after(settings.stop_after_minutes)
    out = Path(settings.out)
    corpus = open_corpus(settings, out, console)
    runs, stopped = [], f"Stopped after {settings.stop_after_minutes} minutes; the same command goes on."
    for seed in settings.seeds:  # seeds outermost, so that what is finished is paired
        for arm in settings.arms:
            run = train_arm(settings, arm, seed, corpus, out / "runs" / f"{arm}-seed{seed}", deadline)
            if run is None:
                console.print(stopped)
                return False
            if run["diverged_at_tokens"] is not None:
                console.print(Text(diverged(settings, run), style="yellow"))
            runs.append(run)
    prefill = measure_prefill(settings, trained_models(runs, out), out / "prefill.json", deadline)
    if prefill is None:
        console.print(stopped)
        return False
    comparison = {
        "settings": dataclasses.asdict(settings),
        "data": data_facts(settings, corpus),
        "environment": environment(resolve_device(settings.device), settings.dtype),
        "runs": runs,
        "prefill": prefill,
    }
    write_json(out / "comparison.json", comparison)
    page = write_report(comparison, out / "report.html")
    print_summary(comparison, console)
    for sentence in verdict(comparison):
        console.print(Text(f"- {sentence}"))
    console.print(f"Page: {page}   Numbers: {out / 'comparison.json'}   ({time.monotonic() - started:.0f} s)")
    return True


def train(settings: TrainSettings, console: Console) -> bool:
    """Train one arm with one seed. False if `stop_after_minutes` cut it off.

    Raises SettingError where the loss diverged; that is kept as the run's result.
    """
    settings.check()
    deadline = deadline_after(settings.stop_after_minutes)
    out = Path(settings.out)
    corpus = open_corpus(settings, out, console)
    run = train_arm(settings, settings.arm, settings.seed, corpus, out, deadline)
    if run is None:
        console.print(f"Stopped after {settings.stop_after_minutes:g} minutes; the same command goes on.")
        return False
    if run["diverged_at_tokens"] is not None:
        raise SettingError(diverged(settings, run))
    console.print(
        f"{settings.arm} seed {settings.seed}: validation loss {run['validation_loss']:.4f} after "
        f"{run['train_tokens']:,} tokens at {run['tokens_per_s']:,.0f} tokens/s. Model: {out / 'model'}"
    )
    return True


def diverged(settings: RunSettings, run: dict[str, Any]) -> str:
    return (
        f"learning_rate is {settings.learning_rate}, with which arm {run['arm']}, seed {run['seed']}, diverged after "
        f"{run['diverged_at_tokens']:,} tokens; it must be lower"
    )


def trained_models(runs: list[dict[str, Any]], out: Path) -> dict[str, Path]:
    """A trained model's folder for each arm: that of its first seed which didn't diverge."""
    folders: dict[str, Path] = {}
    for run in runs:
        if run["diverged_at_tokens"] is None:
            folders.setdefault(run["arm"], out / "runs" / f"{run['arm']}-seed{run['seed']}" / "model")
    return folders


def open_corpus(settings: RunSettings, out: Path, console: Console) -> Corpus:
    """The tokenised data of a run folder, after making sure that the folder holds no other run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    marker = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise SettingError(f"out is {out}, which is a file; it must be a folder")
    if out.is_dir() and not marker.exists() and any(p.name != "cache" for p in out.iterdir()):
        raise SettingError(f"out is {out}, which holds other files; it must be an empty or new folder, or a run's")
    corpus = prepare(
        settings.data or None,
        cache_dir=Path(settings.cache_dir) if settings.cache_dir else out / "cache",
        seq_len=settings.seq_len,
        vocab_size=settings.vocab_size,
        tokenizer=settings.tokenizer,
        max_bytes=settings.max_bytes,
        text_field=settings.text_field,
    )
    if corpus.info["vocab_size"] > settings.vocab_size:
        held, allowed = corpus.info["vocab_size"], settings.vocab_size
        raise SettingError(f"tokenizer has {held} tokens; it must have vocab_size, which is {allowed}, or fewer")
    now = fingerprint(settings, corpus.info["data_hash"])
    now["arm and seed"] = [settings.arm, settings.seed] if isinstance(settings, TrainSettings) else "several"
    if marker.exists():
        refuse_change(json.loads(marker.read_text()), now, out)
    else:
        write_json(marker, now)
    info = corpus.info
    console.print(
        f"Data: {', '.join(info['source'])}: {info['train_documents']:,} documents, {info['train_tokens']:,} tokens to "
        f"train on, {info['validation_tokens']:,} held out"
    )
    return corpus


def data_facts(settings: RunSettings, corpus: Corpus) -> dict[str, Any]:
    epochs = settings.steps * settings.tokens_per_step / corpus.info["train_tokens"]
    return corpus.info | {"epochs": round(epochs, 3)}
