"""Prefill time of each arm against dense, measured in one process with the arms taking turns."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import write_json
from query_experts.model import costs
from query_experts.study.callbacks import StopRequest
from query_experts.study.settings import CompareSettings
from query_experts.study.statistics import disturbed


@torch.no_grad()
def measure_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path, stop: StopRequest) -> bool:
    """Time each arm at each length, into the file `kept`; folders: arm -> trained model. False if time ran out.

    Batch 1, into an empty dynamic cache, logits of the last token alone. Every repeat times all arms one after
    another, so that a machine whose speed drifts slows them alike; ratios are taken within a repeat. A length that
    was measured isn't measured again for the same models on the same machine, unless other work disturbed it and
    there is time left.
    """
    made_with = conditions(settings, folders)
    seconds = _read_kept(kept, made_with)
    kept_at = {length: seconds.get(str(length), {}) for length in settings.prefill_lengths}
    missing = [length for length, by_arm in kept_at.items() if by_arm.keys() != folders.keys()]
    again = [length for length in kept_at.keys() - {*missing} if any(map(disturbed, kept_at[length].values()))]
    todo = [*missing, *([] if stop.made else sorted(again))]
    if not todo:
        return True
    models = {arm: load(folder, settings) for arm, folder in folders.items()}
    with tqdm(total=len(todo) * (settings.prefill_repeats + 1), desc="prefill", unit="turn") as bar:
        for length in todo:
            seconds[str(length)] = time_prefill(models, length, settings, bar)
            write_json(kept, {"made_with": made_with, "seconds": seconds})
            if stop.made:
                return length in again or length == missing[-1]
    return True


def kept_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path) -> dict[str, Any] | None:
    """What `measure_prefill` has found so far, as the report takes it, or None where that is nothing.

    seconds: arm -> for each length, those of every repeat, none where it isn't timed yet; limit: arm -> N/(kG+1),
    where there is a dense arm.
    """
    seconds = _read_kept(kept, conditions(settings, folders))
    timed = [seconds.get(str(length), {}) for length in settings.prefill_lengths]
    if not any(timed):
        return None
    configs = {arm: read(AutoConfig, folder) for arm, folder in folders.items()}
    dense = configs.get("dense")
    return {
        "lengths": settings.prefill_lengths,
        "repeats": settings.prefill_repeats,
        "dtype": settings.autocast_dtype(),
        "limit": {arm: costs.attention_limit(config, dense) for arm, config in configs.items()} if dense else {},
        "seconds": {arm: [at_length.get(arm, []) for at_length in timed] for arm in folders},
    }


def conditions(settings: CompareSettings, folders: dict[str, Path]) -> dict[str, Any]:
    """All that timings which are set side by side must have in common."""
    where = environment(settings.torch_device, settings.autocast_dtype())
    configs = {arm: (folder / "config.json").read_bytes() for arm, folder in folders.items()}
    return {
        "models": {arm: [folders[arm].parent.name, hashlib.sha256(configs[arm]).hexdigest()] for arm in folders},
        "repeats": settings.prefill_repeats,
        "environment": {name: value for name, value in where.items() if name != "date"},
    }


def _read_kept(kept: Path, made_with: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Length -> arm -> seconds of each repeat, as measured before under these conditions, of models still the same."""
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        models = before["made_with"].pop("models")
        if before["made_with"] != {name: value for name, value in made_with.items() if name != "models"}:
            return {}
        same = {arm for arm, model in made_with["models"].items() if models.get(arm) == model}
        return {
            length: {arm: seconds for arm, seconds in by_arm.items() if arm in same}
            for length, by_arm in before["seconds"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def time_prefill(
    models: dict[str, PreTrainedModel], length: int, settings: CompareSettings, bar: tqdm
) -> dict[str, list[float]]:
    """Seconds of each repeat for each arm, at one prompt length."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(settings.vocab_size, (1, length), generator=generator).to(settings.torch_device)
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
    model = read(AutoModelForCausalLM, folder, dtype=getattr(torch, settings.autocast_dtype()))
    return model.to(settings.torch_device).eval()


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """A trained model, or its configuration. Raises SettingError for one that is damaged."""
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise SettingError(
            f"out holds the trained model {folder}, which can't be loaded ({error}); delete the folder that holds it, "
            "and that run is trained again"
        ) from error


def prefill_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """prompt [1, T] -> seconds."""
    kinds = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    synchronise = kinds.get(prompt.device.type, lambda: None)
    synchronise()
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    return time.perf_counter() - started
