"""`query-experts distill`: trains a converted checkpoint, with the dense model as its teacher or without a teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from query_experts.common.checkpoints import (
    has_tokenizer,
    load_config,
    load_gqe,
    load_gqe_config,
    load_tokenizer,
    load_whole,
)
from query_experts.common.errors import SettingError
from query_experts.distributed.layout import check_groups
from query_experts.model.arms import ModelSize
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.kernel_choice import use_kernels
from query_experts.study.settings import DistillSettings
from query_experts.study.sharded import load_sharded, sharding
from query_experts.study.single import train_one
from query_experts.study.train import StartingPoint


def distill(settings: DistillSettings, console: Console) -> bool:
    """Trains a converted checkpoint, and returns and raises as `train` of `study.single`."""
    settings.check()
    start = load_start(settings)
    return train_one(with_model_sizes(settings, start.model.config), "converted", console, start)


def load_start(settings: DistillSettings) -> StartingPoint:
    """The converted model and its teacher. Raises SettingError for checkpoints that can't be used."""
    config = load_gqe_config(Path(settings.init), "init")
    check_groups(settings.tp_size, config.num_key_value_heads, "init's num_key_value_heads")
    model, tokenizer = load_gqe(Path(settings.init), "init", distributed_config=sharding(settings))
    use_kernels(model, settings.kernels)
    if tokenizer.eos_token_id is None:
        raise SettingError(f"init is {settings.init}, whose tokenizer has no eos_token; it needs one to end a document")
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):  # the model's own, unless the user sets them
        if settings.is_given(name):
            setattr(model.config, name, getattr(settings, name))
    if settings.sparsify_fraction and (model.config.output_projection != "expert" or model.config.routing == "none"):
        raise SettingError(
            f"sparsify_fraction is {settings.sparsify_fraction}, which needs an init with a router and "
            "output_projection 'expert'; it must be 0"
        )
    teacher = load_matching_teacher(settings, settings.teacher, model, tokenizer) if settings.teacher else None
    return StartingPoint(model, teacher, settings.distillation, settings.sparsify_fraction)


def load_matching_teacher(
    settings: DistillSettings, name: str, model: PreTrainedModel, tokenizer: Any
) -> PreTrainedModel:
    """The teacher. Raises SettingError for one with another vocabulary, or for shorter sequences."""
    teacher = load_teacher(name, settings)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise SettingError(
            f"teacher has a vocabulary of {teacher.config.vocab_size}; it must be that of init, "
            f"{model.config.vocab_size}"
        )
    longest = getattr(teacher.config, "max_position_embeddings", None)
    if longest is not None and settings.seq_len > longest:
        raise SettingError(
            f"seq_len is {settings.seq_len}; it must be at most teacher's max_position_embeddings, {longest}"
        )
    if has_tokenizer(name) and load_tokenizer(name, teacher, "teacher").get_vocab() != tokenizer.get_vocab():
        raise SettingError(f"teacher is {name}, whose tokenizer isn't that of init; they must agree")
    return teacher


def load_teacher(name: str, settings: DistillSettings | None = None) -> PreTrainedModel:
    """A causal language model, which the ranks share as they share the model that is trained.

    In float32 where each process has all of it; where they share it, in the dtype that it computes in, bf16 or float32.
    Raises SettingError for a checkpoint that can't be loaded.
    """
    if settings is None or not settings.is_sharded:
        return load_whole(AutoModelForCausalLM, name, torch.float32, "teacher")
    groups = getattr(load_config(name, "teacher"), "num_key_value_heads", settings.tp_size)
    check_groups(settings.tp_size, groups, "teacher's num_key_value_heads")
    dtype = getattr(torch, settings.autocast_dtype())
    return load_sharded(AutoModelForCausalLM, name, settings, "teacher", dtype)


def with_model_sizes(settings: DistillSettings, config: GQEConfig) -> DistillSettings:
    """The settings with the sizes and the tokenizer of the model that is trained.

    Raises SettingError for a size that was set to something else, another tokenizer, and sequences that are longer than
    the model takes.
    """
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelSize) if hasattr(settings, f.name)}
    for name, own in (sizes | {"tokenizer": None}).items():
        value = getattr(settings, name)
        if settings.is_given(name) and value != own:
            raise SettingError(f"{name} is {value!r}, and init brings its own; it must be left out")
    if settings.seq_len > config.max_position_embeddings:
        raise SettingError(
            f"seq_len is {settings.seq_len}; it must be at most init's max_position_embeddings, "
            f"{config.max_position_embeddings}"
        )
    sized = dataclasses.replace(settings, **sizes, tokenizer=settings.init)
    sized.given = settings.given  # type: ignore[misc]
    return sized
