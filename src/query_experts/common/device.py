"""The device that a command runs on, and what its hardware can do."""

from __future__ import annotations

import importlib.util
import re
from typing import Literal

import torch

from query_experts.common.errors import SettingError

Device = Literal["auto", "cpu", "cuda", "mps"]
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # torch's names, on x86 and on ARM

# dense bf16 products on tensor cores, FLOP/s, from NVIDIA's data sheets of the H100, H200, A100 and HGX B200 (the half
# of what they print "with sparsity"); the first name within the device's counts
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


def resolve_device(device: Device) -> Device:
    """Returns the device that a setting means.

    Args:
        device: `auto`, or a device's name.

    Returns:
        `cuda` or `cpu` for `auto`, and any other name unchanged: settings of another machine can be read here.
        `check_device` refuses what this machine can't use.
    """
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises SettingError for a device that doesn't exist or that this machine lacks."""
    if device == "auto":
        return
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device not in present:
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda or mps")
    if not present[device]:
        usable = ", ".join(name for name, here in present.items() if here)
        raise SettingError(f"device is {device!r}, which is not there; on this machine it must be auto, {usable}")


def check_compiler(wanted: bool, device: str) -> None:
    """Raises SettingError where models are to be compiled and torch finds no compiler for the device."""
    if not wanted:
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports what compiling needs, which takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = bool(importlib.util.find_spec("triton")) if device == "cuda" else bool(get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError):
        found = False
    if not found:
        needed = "triton" if device == "cuda" else "a C++ compiler (g++, clang++, or CXX=...)"
        raise SettingError(f"compile is True, which needs {needed} that isn't there; it must be False")


def has_bfloat16(device: str) -> bool:
    """Whether the device has instructions for bf16, as far as torch says; it says nothing about mps.

    Without such instructions bf16 takes longer than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS)


def peak_flops(hardware: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s of a GPU by its name, such as `NVIDIA H100 80GB HBM3`; None for one without an entry and for float32."""
    if dtype != "bfloat16":
        return None
    return next((flops for name, flops in PEAKS.items() if re.search(rf"\b{name}\b", hardware)), None)
