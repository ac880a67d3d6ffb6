"""Tied embeddings under FSDP2: both modules must share a parameter before it is sharded, in one group.

Transformers 5.20 to 5.23 shards first and ties afterwards. FSDP2 then gives the head weights of its own in every
forward pass, which no optimizer step reaches: loss and gradients are right in the first step only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SHARD = "apply_fully_sharded_data_parallelism"  # of Transformers


@contextmanager
def tied_before_sharding() -> Iterator[None]:
    """Within it, Transformers ties embeddings before it shards a model, and leaves both to the root's group of FSDP2.

    GQE models are loaded so anyway. A stock model with tied embeddings must be loaded within it.
    """
    from transformers.distributed import mixin

    original = getattr(mixin, SHARD)

    def tie_and_shard(model: Any, *args: Any) -> Any:
        names = tied_modules(model)
        if names:
            model.tie_weights()
            model._fsdp_plan = without(model._fsdp_plan, names)  # which earlier versions read here
            args = tuple(without(each, names) if isinstance(each, dict) else each for each in args)
        return original(model, *args)

    setattr(mixin, SHARD, tie_and_shard)
    try:
        yield
    finally:
        setattr(mixin, SHARD, original)


def tied_modules(model: Any) -> list[str]:
    """The names of embedding and head, where they are tied."""
    if not model.config.tie_word_embeddings or model.get_output_embeddings() is None:
        return []
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is each for each in tied)]


def without(plan: dict[str, str], names: list[str]) -> dict[str, str]:
    return {name: style for name, style in plan.items() if name not in names}


def check_tied(model: nn.Module) -> None:
    """Raises ValueError for a sharded model whose head would keep the weights that it began with."""
    owners = [managed.module for managed in _managed(model)]
    tied = [model.get_submodule(name) for name in tied_modules(model)]
    if sum(any(owner is module for owner in owners) for module in tied) > 1:
        raise ValueError(
            "tie_word_embeddings is True, and Transformers has sharded embedding and lm_head apart, so that lm_head "
            "would keep its first weights; load the model within query_experts.model.tied.tied_before_sharding()"
        )


def _managed(model: nn.Module) -> list[Any]:
    """Which module has each parameter that FSDP2 shards."""
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    states = [module._get_fsdp_state() for module in sharded]
    groups = [getattr(state, "_fsdp_param_group", None) for state in states]
    return [param._module_info for group in groups if group is not None for param in group.fsdp_params]
