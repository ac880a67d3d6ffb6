"""Loads a model that the ranks of a launch share, as the settings say."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from query_experts.common.checkpoints import load_whole
from query_experts.distributed.ranks import num_processes
from query_experts.model.tied import tied_before_sharding
from query_experts.study.settings import RunSettings


def sharding(settings: RunSettings) -> Any:
    """The `DistributedConfig` of Transformers for a sharded run; None for one in which each rank has a whole model."""
    if not settings.is_sharded:
        return None
    from transformers.distributed import DistributedConfig

    fsdp_size = settings.fsdp_size or 1
    copies = num_processes() // (fsdp_size * settings.tp_size)
    return DistributedConfig(
        tp_size=settings.tp_size, fsdp_size=fsdp_size, **({"dp_replicate_size": copies} if copies > 1 else {})
    )


def load_sharded(
    kind: Any, checkpoint: str, settings: RunSettings, field: str = "checkpoint", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A checkpoint's model, each rank's part of it where the settings share it. Raises as `load_whole`."""
    with tied_before_sharding():
        return load_whole(kind, checkpoint, dtype, field, distributed_config=sharding(settings))
