"""How the processes of a launch share a model: copies of it (DDP), shards of a copy (FSDP2), groups of a layer (TP)."""

from __future__ import annotations

import os
from dataclasses import fields

import torch
import transformers

from query_experts.common.errors import SettingError
from query_experts.common.formatting import plural
from query_experts.distributed.ranks import num_processes
from query_experts.model.configuration_gqe import SHARDS_BY_GROUP

OLDEST_SHARDING = "5.20"  # Transformers
# set by `accelerate launch` from its own configuration file
OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "FSDP by Accelerate's plug-in",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's own parallelism",
}


def data_parallel_ranks(tp_size: int) -> int:
    """Processes that train on sequences of their own."""
    return max(1, num_processes() // tp_size)


def check_groups(tp_size: int, num_kv_heads: int, field: str = "num_key_value_heads") -> None:
    """Raises SettingError for a model whose KV groups processes can't share. field: what the sentence calls them."""
    if num_kv_heads % tp_size:
        raise SettingError(
            f"tp_size is {tp_size}; it must divide {field}, {num_kv_heads}: processes share a layer by its KV groups"
        )


def check_layout_of_ranks(fsdp_size: int | None, tp_size: int) -> None:
    """Raises SettingError for sizes that the processes of this launch can't be divided by."""
    processes = num_processes()
    for variable, name in OF_ACCELERATE.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise SettingError(
                f"{variable} is {os.environ[variable]}, which asks for {name}; it must be unset: fsdp_size and tp_size "
                "say how processes share a model"
            )
    together = (fsdp_size or 1) * tp_size
    if processes % together:
        sizes = {"fsdp_size": fsdp_size or 1, "tp_size": tp_size}
        sizes = {name: size for name, size in sizes.items() if size > 1}
        there = f"there is {plural(processes, 'process')}" if processes == 1 else f"there are {processes} processes"
        raise SettingError(
            f"{' x '.join(sizes)} is {' x '.join(map(str, sizes.values()))}, and {there} (WORLD_SIZE); it must divide "
            "their number. Launch more with torchrun --nproc_per_node"
        )
    if together > 1 and not SHARDS_BY_GROUP:
        raise SettingError(
            f"transformers is {transformers.__version__}, which can't share a model of this kind between processes; "
            f"fsdp_size and tp_size need {OLDEST_SHARDING} or newer"
        )
    if together > 1 and processes > together and not copies_of_shards():
        raise SettingError(
            f"transformers is {transformers.__version__}, which can't train several copies of a model that processes "
            f"share; fsdp_size x tp_size must be the number of processes, {processes} (5.23 lifts that)"
        )


def check_device_of_shards(device: str) -> None:
    """Raises SettingError for a device on which Transformers doesn't place the shards of a model."""
    accelerator = torch.accelerator.current_accelerator()
    placed = accelerator.type if accelerator is not None and accelerator.type != "mps" else "cpu"
    if device != placed:
        raise SettingError(
            f"device is {device!r}, and processes share a model on {placed!r} here; it must be {placed} or auto (for "
            "cpu, set CUDA_VISIBLE_DEVICES to nothing)"
        )


def copies_of_shards() -> bool:
    """Whether Transformers takes `dp_replicate_size`: copies of a model, each shared by some processes."""
    from transformers.distributed import DistributedConfig

    return any(field.name == "dp_replicate_size" for field in fields(DistributedConfig))


def require_one_process(command: str) -> None:
    """Raises SettingError for a launch on several processes."""
    if num_processes() > 1:
        raise SettingError(
            f"WORLD_SIZE is {num_processes()}; {command} works in one process, so it must be 1 (compare, train and "
            "distill take several)"
        )
