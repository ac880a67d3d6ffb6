"""The main job: train the arms head to head, time their prefill, and write the table and the page."""

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
from query_experts.data import Corpus, prepare
from query_experts.model.arms import ARMS
from query_experts.study.callbacks import StopRequest
from query_experts.study.prefill import kept_prefill, measure_prefill
from query_experts.study.report import print_summary, write_report
from query_experts.study.results import read_result
from query_experts.study.settings import CompareSettings, RunSettings
from query_experts.study.train import held_out, stop_after, train_arm, trained_on
from query_experts.study.workspace import fingerprint, holds_results, own_folder, refuse_change


def compare(settings: CompareSettings, console: Console) -> bool:
    """Train what isn't trained yet, measure, report. False if `stop_after_minutes` cut it off.

    The report holds every finished run of the folder, whatever arms and seeds this call asks for.
    """
    settings.check()
    with own_folder(Path(settings.out)) as out:
        return compare_in(out, settings, console)


def compare_in(out: Path, settings: CompareSettings, console: Console) -> bool:
    started = time.monotonic()
    stop = stop_after(settings.stop_after_minutes)
    corpus = open_corpus(settings, out, console)
    asked = [(arm, seed) for seed in settings.seeds for arm in settings.arms]  # what is finished first is paired
    for number, (arm, seed) in enumerate(asked, 1):
        folder = run_folder(out, arm, seed)
        if new := not (folder / "result.json").exists():
            console.print(f"Run {number} of {len(asked)}: {arm}, seed {seed}")
        run = train_arm(settings, arm, seed, corpus, folder, stop)
        if run is not None and run.get("diverged_at_tokens") is not None:
            console.print(Text(diverged(settings, run), style="yellow"))
        if new or number == len(asked):
            write_comparison(settings, corpus, out)  # of all runs so far: the page is there to look at meanwhile
        if run is None or stop.signal is not None:
            return stopped(settings, stop, console)
    timed = measure_prefill(settings, trained_models(out), out / "prefill.json", stop)
    comparison = write_comparison(settings, corpus, out)
    if not timed:
        return stopped(settings, stop, console)
    print_summary(comparison, console)
    took = f"({time.monotonic() - started:.0f} s)"
    console.print(Text(f"Page: {out / 'report.html'}   Numbers: {out / 'comparison.json'}   {took}"))
    return True


def stopped(settings: RunSettings, stop: StopRequest, console: Console) -> bool:
    """False, as time ran out; where a signal asked for the stop, the process ends by it now that all is saved."""
    after = f" after {settings.stop_after_minutes:g} minutes" if stop.signal is None else ""
    console.print(f"Stopped{after}; the same command goes on.")
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)
    return False


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm}-seed{seed}"


def write_comparison(settings: CompareSettings, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Everything that the folder holds so far, as comparison.json and as a page."""
    runs = finished_runs(out)
    held = {"arms": [run["arm"] for run in runs], "seeds": [run["seed"] for run in runs]}
    both = {name: list(dict.fromkeys([*getattr(settings, name), *held[name]])) for name in held}
    comparison = {
        "settings": dataclasses.asdict(settings) | both,
        "data": data_facts(settings, corpus),
        "environment": environment(settings.torch_device, settings.autocast_dtype()),
        "runs": runs,
        "prefill": kept_prefill(settings, trained_models(out), out / "prefill.json"),
    }
    write_json(out / "comparison.json", comparison)
    write_report(comparison, out / "report.html")
    return comparison


def finished_runs(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, seed by seed, arms in the study's order."""
    runs = [read_result(path) for path in out.glob("runs/*/result.json")]
    return sorted(runs, key=lambda run: (run["seed"], [*ARMS].index(run["arm"])))


def trained_models(out: Path) -> dict[str, Path]:
    """A trained model's folder for each arm: that of its first seed which didn't diverge."""
    folders: dict[str, Path] = {}
    for run in finished_runs(out):
        if run.get("diverged_at_tokens") is None:
            folders.setdefault(run["arm"], run_folder(out, run["arm"], run["seed"]) / "model")
    for arm, folder in folders.items():
        if not (folder / "config.json").exists():
            raise SettingError(
                f"out is {out}, where the trained model {folder} of arm {arm} is missing; delete the folder that held "
                "it, and that run is trained again"
            )
    return folders


def diverged(settings: RunSettings, run: dict[str, Any]) -> str:
    return (
        f"learning_rate is {settings.learning_rate}, with which arm {run['arm']}, seed {run['seed']}, diverged after "
        f"{run['diverged_at_tokens']:,} tokens; it must be lower"
    )


def open_corpus(settings: RunSettings, out: Path, console: Console) -> Corpus:
    """The tokenised data of a run folder, after making sure that the folder holds no other run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    marker = out / "settings.json"
    remedy = "nothing else tells with which settings this folder was made; use another"
    kept = read_json(marker, remedy) if marker.exists() and holds_results(out) else None
    now = fingerprint(settings)
    if kept is not None:  # before anything is read for data that may be refused
        refuse_change({name: value for name, value in kept.items() if name != "data_hash"}, now, out)
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
    if len(corpus.train) < settings.sequences_per_step:
        raise SettingError(
            f"batch_size * gradient_accumulation_steps is {settings.sequences_per_step}; it must be at most the "
            f"{len(corpus.train)} sequences that data holds"
        )
    now["data_hash"] = corpus.info["data_hash"]
    if kept is not None:
        refuse_change(kept, now, out)
    else:
        write_json(marker, now)
    info = corpus.info
    limit = f" (max_bytes: {info['max_bytes'] / 1e6:g} MB)" if info["max_bytes"] else ""
    console.print(
        Text(
            f"Data: {', '.join(info['source'])}{limit}: {plural(info['train_documents'], 'document')}, "
            f"{info['train_tokens']:,} tokens to train on, {info['validation_tokens']:,} held out "
            f"({info['validation']})"
        )
    )
    if settings.validation_sequences > len(corpus.validation):
        console.print(
            Text(
                f"validation_sequences is {settings.validation_sequences:,}; data holds out "
                f"{len(corpus.validation):,}, and all of them are used",
                style="yellow",
            )
        )
    if info["skipped_files"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in [*info["skipped_files"].items()][:5])
        skipped = plural(sum(info["skipped_files"].values()), "file")
        console.print(Text(f"{skipped} of other kinds in the folders skipped ({kinds})", style="yellow"))
    return corpus


def data_facts(settings: RunSettings, corpus: Corpus) -> dict[str, Any]:
    used = len(held_out(settings, corpus))
    epochs = settings.steps * settings.sequences_per_step / len(trained_on(settings, corpus))
    return corpus.info | {
        "epochs": round(epochs, 3),
        "validation_sequences_used": used,
        "validation_tokens_used": used * settings.seq_len,
    }
