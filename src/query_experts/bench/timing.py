"""Owns the clock: calls timed in turn, so that a machine whose speed drifts slows all of them alike; peak memory."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

LEAST_SECONDS = 0.02  # a shorter call is repeated within one timing
MOST_LOOPS = 1000

Call = Callable[[], object]


def time_in_turn(calls: Mapping[str, Call], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of one call, for each of `repeats` timings. Another call goes first in each round; one round warms up."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    for call in calls.values():
        call()
    once = {name: _seconds(call, 1, synchronise) for name, call in calls.items()}
    loops = {name: min(MOST_LOOPS, math.ceil(LEAST_SECONDS / max(taken, 1e-9)) or 1) for name, taken in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(calls[name], loops[name], synchronise))
    return seconds


def _seconds(call: Call, loops: int, synchronise: Call) -> float:
    synchronise()
    started = time.perf_counter()
    for _ in range(loops):
        call()
    synchronise()
    return (time.perf_counter() - started) / loops


def peak_bytes(call: Call, device: str) -> int | None:
    """Bytes that one call takes beyond what was held before it; None where the system doesn't tell."""
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    if device != "cpu" or not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    held = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - held)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
