"""Prefill time of each arm against dense, measured in one process with the arms taking turns."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from query_experts import costs
from query_experts.files import write_json
from query_experts.study.environment import environment
from query_experts.study.settings import CompareSettings, resolve_device
from query_experts.study.statistics import disturbed


@torch.no_grad()
def measure_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path, deadline: float | None) -> bool:
    """Time each arm at each length, into the file `kept`; folders: arm -> trained model. False if time ran out.

    Batch 1, into an empty dynamic cache, logits of the last token alone. Every repeat times all arms one after
    another, so that a machine whose speed drifts slows them alike; ratios are taken within a repeat. A length that
    was measured isn't measured again for the same models on the same machine, unless other work disturbed it.
    """
    made_with = conditions(settings, folders)
    seconds = _read_kept(kept, made_with)  # length -> arm -> seconds of each repeat
    todo = [
        length
        for length in settings.prefill_lengths
        if str(length) not in seconds or any(disturbed(repeats) for repeats in seconds[str(length)].values())
    ]
    if not todo:
        return True
    models = {arm: load(folder, settings) for arm, folder in folders.items()}
    with tqdm(total=len(todo) * (settings.prefill_repeats + 1), desc="prefill", unit="turn") as bar:
        for length in todo:
            seconds[str(length)] = time_in_turn(models, length, settings, bar)
            write_json(kept, {"made_with": made_with, "seconds": seconds})
            if deadline is not None and time.monotonic() >= deadline and length != todo[-1]:
                return False
    return True


def kept_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path) -> dict[str, Any] | None:
    """What `measure_prefill` found, as the report takes it, or None where a length is missing.

    seconds: arm -> for each length, those of every repeat; limit: arm -> N/(kG+1), where there is a dense arm.
    """
    seconds = _read_kept(kept, conditions(settings, folders))
    if not folders or not all(str(length) in seconds for length in settings.prefill_lengths):
        return None
    configs = {arm: AutoConfig.from_pretrained(folder) for arm, folder in folders.items()}
    dense = configs.get("dense")
    return {
        "lengths": settings.prefill_lengths,
        "repeats": settings.prefill_repeats,
        "dtype": settings.dtype,
        "limit": {arm: costs.attention_limit(config, dense) for arm, config in configs.items()} if dense else {},
        "seconds": {arm: [seconds[str(length)][arm] for length in settings.prefill_lengths] for arm in folders},
    }


def conditions(settings: CompareSettings, folders: dict[str, Path]) -> dict[str, Any]:
    """All that timings which are set side by side must have in common."""
    where = environment(resolve_device(settings.device), settings.dtype)
    configs = {arm: (folder / "config.json").read_bytes() for arm, folder in folders.items()}
    return {
        "models": {arm: [folders[arm].parent.name, hashlib.sha256(configs[arm]).hexdigest()] for arm in folders},
        "repeats": settings.prefill_repeats,
        "environment": {name: value for name, value in where.items() if name != "date"},
    }


def _read_kept(kept: Path, made_with: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """What was measured before under these conditions, or nothing."""
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        return dict(before["seconds"]) if before["made_with"] == made_with else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def time_in_turn(
    models: dict[str, PreTrainedModel], length: int, settings: CompareSettings, bar: tqdm
) -> dict[str, list[float]]:
    """Seconds of each repeat for each arm, at one prompt length."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(settings.vocab_size, (1, length), generator=generator).to(resolve_device(settings.device))
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    for repeat in range(settings.prefill_repeats + 1):
        first = repeat % len(models) if models else 0  # another arm begins each turn
        for arm, model in [*models.items()][first:] + [*models.items()][:first]:
            elapsed = prefill_seconds(model, prompt)
            if repeat > 0:  # the first turn warms up
                seconds[arm].append(elapsed)
        bar.update()
    return seconds


def load(folder: Path, settings: CompareSettings) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    return model.to(resolve_device(settings.device)).eval()


def prefill_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """prompt [1, T] -> seconds."""
    kinds = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    synchronise = kinds.get(prompt.device.type, lambda: None)
    synchronise()
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    return time.perf_counter() - started
