"""Prefill time of each arm against dense, measured in one process with the arms taking turns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from query_experts import costs
from query_experts.study.settings import CompareSettings, resolve_device


@torch.no_grad()
def measure_prefill(settings: CompareSettings, folders: dict[str, Path]) -> dict[str, Any]:
    """Seconds of every repeat, for each arm and length; folders: arm -> trained model.

    Batch 1, into an empty dynamic cache, logits of the last token alone. Every repeat times all arms one after
    another, so that a machine whose speed drifts slows them alike; ratios are taken within a repeat.
    """
    device = resolve_device(settings.device)
    models = {arm: load(folder, settings) for arm, folder in folders.items()}
    dense = models.get("dense")
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in models}
    turns = len(settings.prefill_lengths) * (settings.prefill_repeats + 1)
    bar = tqdm(total=turns, desc="prefill", unit="turn")
    for length in settings.prefill_lengths:
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(settings.vocab_size, (1, length), generator=generator).to(device)
        for arm in models:
            seconds[arm].append([])
        for repeat in range(settings.prefill_repeats + 1):
            first = repeat % len(models)  # another arm begins each turn
            for arm, model in [*models.items()][first:] + [*models.items()][:first]:
                elapsed = prefill_seconds(model, prompt)
                if repeat > 0:  # the first turn warms up
                    seconds[arm][-1].append(elapsed)
            bar.update()
    bar.close()
    limits = {arm: costs.attention_limit(m.config, dense.config) for arm, m in models.items()} if dense else {}
    return {
        "lengths": settings.prefill_lengths,
        "repeats": settings.prefill_repeats,
        "dtype": settings.dtype,
        "limit": limits,
        "seconds": seconds,
    }


def load(folder: Path, settings: CompareSettings) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    return model.to(resolve_device(settings.device)).eval()


def prefill_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """prompt [1, T] -> seconds."""
    synchronise = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    synchronise()
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    return time.perf_counter() - started
