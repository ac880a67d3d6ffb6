"""Times calls in turn, so that a machine whose speed drifts slows all of them alike, and measures peak memory."""

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
    """Times each call `repeats` times, after one round to warm up. Each round starts with another call.

    Returns:
        Seconds of one call, a list for each name.
    """
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
    """Captures the call as a CUDA graph. Replaying it launches all kernels at once, on the captured tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile and tune themselves in their first calls
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: str) -> int:
    """Measures the most memory in bytes that the tensors of one call take, beyond what was allocated before it.

    It includes scratch space of torch's kernels. On a CPU torch's profiler records every allocation: the memory of
    the process depends on what the allocator keeps from earlier calls.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
