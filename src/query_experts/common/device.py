"""The device that a command runs on, and what its hardware can do."""

from __future__ import annotations

import os

import torch

from query_experts.common.errors import SettingError

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # by torch's names, of x86 and of ARM


def resolve_device(device: str) -> str:
    """cpu, cuda or mps. Raises SettingError for a device that isn't there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
    if device not in there:
        raise SettingError(f"device is {device!r}; it must be auto, {', '.join(there)}")
    if not there[device]:
        usable = ", ".join(name for name, present in there.items() if present)
        raise SettingError(f"device is {device!r}, which is not there; on this machine it must be auto, {usable}")
    return device


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies in bf16 by instructions of its own, as far as torch tells: of mps it doesn't.

    Without them it takes longer than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS)


def require_one_process() -> None:
    """Raises SettingError for a launch on several processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise SettingError(
            f"WORLD_SIZE is {processes}; the study runs in one process on one device, so it must be 1 (on several "
            "devices, train with GQETrainer in a script of your own)"
        )
