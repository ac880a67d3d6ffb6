"""Stand-in for the launcher of Transformers' tensor-parallel and FSDP tests, which the distribution lacks.

It starts the ranks as new processes, with gloo on the CPU or the accelerator's own backend. A rank that fails or hangs
fails the test.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.testing_utils import backend_torch_accelerator_module

RANKS_TIMEOUT_S = 300.0  # for one test


def _get_distributed_device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def _get_distributed_backend() -> str:
    return {"cuda": "nccl", "xpu": "xccl", "hpu": "hccl"}.get(_get_distributed_device_type(), "gloo")


def _get_rank_device(rank: int) -> torch.device:
    device_type = _get_distributed_device_type()
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)


def _set_rank_device(rank: int) -> None:
    module = backend_torch_accelerator_module(_get_distributed_device_type())
    if module is not None and hasattr(module, "set_device"):
        module.set_device(rank)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int, timeout: float = RANKS_TIMEOUT_S) -> None:
    """Run function(rank, *args) in `nprocs` new processes and wait; raises the error of a rank, or TimeoutError."""
    deadline = time.monotonic() + timeout
    ranks = mp.spawn(function, args=args, nprocs=nprocs, join=False)
    try:
        while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{function.__name__}: the {nprocs} ranks did not end within {timeout:g} s")
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run_rank(rank: int, function: Callable, world_size: int, port: int, args: tuple, kwargs: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    store = dist.TCPStore("localhost", port, world_size=None, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable[..., None]]:
    """run_distributed(n)(function)(*args) runs function(rank, *args) on n ranks of one process group."""

    def with_ranks(function: Callable) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            # this process owns the store, which chose a free port itself, so that no other run can take it
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, world_size, store.port, args, kwargs), world_size)

        return run

    return with_ranks
