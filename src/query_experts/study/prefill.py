"""Times the prefill of each arm, in one process with the arms in turn."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json, write_json
from query_experts.model import costs
from query_experts.model.kernel_choice import use_kernels
from query_experts.study.callbacks import StopRequest
from query_experts.study.results import PrefillTimes
from query_experts.study.settings import CompareSettings
from query_experts.study.statistics import disturbed


@dataclass(frozen=True)
class Conditions:
    """What timings that are compared must have in common.

    Args:
        models: By arm, the run that the model is of and the hash of its configuration.
        repeats: Timings of each arm at each length.
        environment: That of `environment()`, without the date.
        kernels: The setting; older files lack it.
    """

    models: dict[str, list[str]]
    repeats: int
    environment: dict[str, str | None]
    kernels: str = "auto"


Seconds = dict[int, dict[str, list[float]]]  # by length and arm, of each repeat


@dataclass(frozen=True)
class KeptTimes:
    """All of prefill.json."""

    made_with: Conditions
    seconds: Seconds


_KEPT = TypeAdapter(KeptTimes)


@torch.no_grad()
def measure_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path, stop: StopRequest) -> bool:
    """Times each arm at each length, with batch 1, an empty dynamic cache, and logits of the last token only.

    Every repeat times all arms one after another, so that a change in the machine's speed affects all of them; ratios
    are taken within a repeat. A length is timed once for the same models on the same machine, and again only if it was
    disturbed and there is time left.

    Args:
        folders: The trained model of each arm.
        kept: The file for the times.

    Returns:
        False if time ran out.
    """
    made_with = conditions(settings, folders)
    seconds = read_kept(kept, made_with)
    at_length = {length: seconds.get(length, {}) for length in settings.prefill_lengths}
    missing = [length for length, by_arm in at_length.items() if by_arm.keys() != folders.keys()]
    again = [length for length in at_length.keys() - {*missing} if any(map(disturbed, at_length[length].values()))]
    todo = [*missing, *([] if stop.made else sorted(again))]
    if not todo:
        return True
    models = {arm: load_model(folder, settings) for arm, folder in folders.items()}
    with tqdm(total=len(todo) * (settings.prefill_repeats + 1), desc="prefill", unit="turn") as bar:
        for length in todo:
            seconds[length] = time_prefill(models, length, settings, bar)
            write_json(kept, dataclasses.asdict(KeptTimes(made_with, seconds)))
            if stop.made:
                return length in again or length == missing[-1]
    return True


def read_prefill(settings: CompareSettings, folders: dict[str, Path], kept: Path) -> PrefillTimes | None:
    """The times so far for the report, or None where nothing is timed yet."""
    seconds = read_kept(kept, conditions(settings, folders))
    timed = [seconds.get(length, {}) for length in settings.prefill_lengths]
    if not any(timed):
        return None
    configs = {arm: read_pretrained(AutoConfig, folder) for arm, folder in folders.items()}
    dense = configs.get("dense")
    return PrefillTimes(
        lengths=settings.prefill_lengths,
        repeats=settings.prefill_repeats,
        dtype=settings.autocast_dtype(),
        limit={arm: costs.attention_limit(config, dense) for arm, config in configs.items()} if dense else {},
        seconds={arm: [at_length.get(arm, []) for at_length in timed] for arm in folders},
    )


def conditions(settings: CompareSettings, folders: dict[str, Path]) -> Conditions:
    place = dataclasses.asdict(environment(settings.torch_device, settings.autocast_dtype()))
    hashes = {arm: hashlib.sha256((folder / "config.json").read_bytes()) for arm, folder in folders.items()}
    return Conditions(
        models={arm: [folders[arm].parent.name, hashes[arm].hexdigest()] for arm in folders},
        repeats=settings.prefill_repeats,
        environment={name: value for name, value in place.items() if name != "date"},
        kernels=settings.kernels,
    )


def read_kept(kept: Path, made_with: Conditions) -> Seconds:
    """The times in a file that were measured under these conditions, of models that are still the same."""
    try:
        before = _KEPT.validate_python(parse_json(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    models = before.made_with.models
    if dataclasses.replace(before.made_with, models=made_with.models) != made_with:
        return {}
    same = {arm for arm, model in made_with.models.items() if models.get(arm) == model}
    return {
        length: {arm: seconds for arm, seconds in by_arm.items() if arm in same}
        for length, by_arm in before.seconds.items()
    }


def time_prefill(
    models: dict[str, PreTrainedModel], length: int, settings: CompareSettings, bar: tqdm
) -> dict[str, list[float]]:
    """Seconds of each repeat for each arm, at one prompt length."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(settings.vocab_size, (1, length), generator=generator).to(settings.torch_device)
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    for repeat in range(settings.prefill_repeats + 1):
        first = repeat % len(models) if models else 0  # each turn begins with another arm
        for arm, model in [*models.items()][first:] + [*models.items()][:first]:
            elapsed = prefill_seconds(model, prompt)
            if repeat > 0:  # the first turn warms up
                seconds[arm].append(elapsed)
        bar.update()
    return seconds


def load_model(folder: Path, settings: CompareSettings) -> PreTrainedModel:
    model = read_pretrained(AutoModelForCausalLM, folder, dtype=getattr(torch, settings.autocast_dtype()))
    use_kernels(model, settings.kernels)
    return model.to(settings.torch_device).eval()


def read_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Loads a trained model, or its configuration. Raises SettingError for one that is damaged."""
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise SettingError(
            f"out holds the trained model {folder}, which can't be loaded ({error}); delete the folder that holds it, "
            "and that run is trained again"
        ) from error


def prefill_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Times one prefill. prompt: [1, T]."""
    kinds = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    synchronise = kinds.get(prompt.device.type, lambda: None)
    synchronise()
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    return time.perf_counter() - started
