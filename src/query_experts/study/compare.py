"""The main job: train the arms head to head, time their prefill, and write the table and the page."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from query_experts.data import Corpus, prepare
from query_experts.errors import SettingError
from query_experts.files import write_json
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
    runs = []
    for seed in settings.seeds:  # seeds outermost, so that what is finished is paired
        for arm in settings.arms:
            run = train_arm(settings, arm, seed, corpus, out / "runs" / f"{arm}-seed{seed}", deadline)
            if run is None:
                console.print(f"Stopped after {settings.stop_after_minutes:g} minutes; the same command goes on.")
                return False
            runs.append(run)
    first = settings.seeds[0]
    prefill = measure_prefill(settings, {arm: out / "runs" / f"{arm}-seed{first}" / "model" for arm in settings.arms})
    comparison = {
        "settings": dataclasses.asdict(settings),
        "data": data_facts(settings, corpus),
        "environment": environment(settings),
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
    """Train one arm with one seed. False if `stop_after_minutes` cut it off."""
    settings.check()
    deadline = deadline_after(settings.stop_after_minutes)
    out = Path(settings.out)
    corpus = open_corpus(settings, out, console)
    run = train_arm(settings, settings.arm, settings.seed, corpus, out, deadline)
    if run is None:
        console.print(f"Stopped after {settings.stop_after_minutes:g} minutes; the same command goes on.")
        return False
    console.print(
        f"{settings.arm} seed {settings.seed}: validation loss {run['validation_loss']:.4f} after "
        f"{run['train_tokens']:,} tokens at {run['tokens_per_s']:,.0f} tokens/s. Model: {out / 'model'}"
    )
    return True


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


def environment(settings: RunSettings) -> dict[str, Any]:
    device = resolve_device(settings.device)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in ("torch", "transformers", "query-experts")},
        "device": device,
        "hardware": hardware,
        "dtype": settings.dtype,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
