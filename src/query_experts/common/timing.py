"""Owns the clock: calls timed in turn, so that a machine whose speed drifts slows all of them alike; peak memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

LEAST_SECONDS = 0.02  # a shorter call is repeated within one timing
MOST_LOOPS = 1000

Call = Callable[[], object]


def time_interleaved(calls: Mapping[str, Call], repeats: int, device: str) -> dict[str, list[float]]:
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


def as_cuda_graph(call: Call) -> Call:
    """The call as a CUDA graph: all of its kernels at one launch, on the tensors that they were captured with."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels that are compiled or tuned at their first calls, before capturing
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: str) -> int:
    """Bytes of tensors, scratch space of torch's kernels included, that one call holds at most beyond those before it.

    On a CPU as torch's profiler records every allocation: what the process takes from the system depends on what the
    allocator has kept from earlier calls.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
