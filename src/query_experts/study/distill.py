"""Training one arm, or on from a converted checkpoint, with a teacher if there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedModel

from query_experts.common.checkpoints import has_tokenizer, load_gqe, load_tokenizer, load_whole
from query_experts.common.errors import SettingError
from query_experts.common.settings import default_of
from query_experts.model.arms import ModelSize
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.study.compare import diverged, open_corpus, stopped
from query_experts.study.settings import TrainSettings
from query_experts.study.train import StartingPoint, stop_after, train_arm
from query_experts.study.workspace import own_folder


def train(settings: TrainSettings, console: Console) -> bool:
    """Train one arm with one seed. False if `stop_after_minutes` cut it off.

    Raises SettingError where the loss diverged; that is kept as the run's result.
    """
    settings.check()
    start, arm = None, settings.arm
    if settings.init is not None:
        start, arm = load_start(settings), "converted"
        settings = with_model_sizes(settings, start.model.config)
    with own_folder(Path(settings.out)) as out:
        stop = stop_after(settings.stop_after_minutes)
        corpus = open_corpus(settings, out, console)
        run = train_arm(settings, arm, settings.seed, corpus, out, stop, start)
    if run is None:
        return stopped(settings, stop, console)
    if run.get("diverged_at_tokens") is not None:
        raise SettingError(diverged(settings, run))
    began = f"{run['validation_curve'][0][1]:.4f} at the start, " if start is not None else ""
    began += f"teacher's {run['teacher_loss']:.4f}, " if "teacher_loss" in run else ""
    console.print(
        Text(
            f"{arm} seed {settings.seed}: validation loss {began}{run['validation_loss']:.4f} after "
            f"{run['train_tokens']:,} tokens at {run['tokens_per_s']:,.0f} tokens/s. Model: {out / 'model'}"
        )
    )
    return True


def load_start(settings: TrainSettings) -> StartingPoint:
    """The converted model and its teacher. Raises SettingError for checkpoints that can't be used."""
    assert settings.init is not None
    model, tokenizer = load_gqe(Path(settings.init), "init")
    if tokenizer.eos_token_id is None:
        raise SettingError(f"init is {settings.init}, whose tokenizer has no eos_token; it needs one to end a document")
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):  # of the training, not of the model that comes
        if settings.is_given(name):
            setattr(model.config, name, getattr(settings, name))
    if settings.sparsify_fraction and (model.config.output_projection != "expert" or model.config.routing == "none"):
        raise SettingError(
            f"sparsify_fraction is {settings.sparsify_fraction}, which needs an init with a router and "
            "output_projection 'expert'; it must be 0"
        )
    teacher = None
    if settings.teacher is not None:
        teacher = load_teacher(settings.teacher)
        theirs, ours = teacher.config.vocab_size, model.config.vocab_size
        if theirs != ours:
            raise SettingError(f"teacher has a vocabulary of {theirs}; it must be that of init, {ours}")
        longest = getattr(teacher.config, "max_position_embeddings", None)
        if longest is not None and settings.seq_len > longest:
            raise SettingError(
                f"seq_len is {settings.seq_len}; it must be at most teacher's max_position_embeddings, {longest}"
            )
        beside = has_tokenizer(settings.teacher)
        if beside and load_tokenizer(settings.teacher, teacher, "teacher").get_vocab() != tokenizer.get_vocab():
            raise SettingError(f"teacher is {settings.teacher}, whose tokenizer isn't that of init; they must agree")
    return StartingPoint(model, teacher, settings.distillation, settings.sparsify_fraction)


def load_teacher(name: str) -> PreTrainedModel:
    """A causal language model, float32. Raises SettingError for a checkpoint that can't be loaded."""
    return load_whole(AutoModelForCausalLM, name, torch.float32, "teacher")


def with_model_sizes(settings: TrainSettings, config: GQEConfig) -> TrainSettings:
    """The settings with the sizes of the model that is trained on, and with its tokenizer.

    Raises SettingError for a size that was set to something else, another tokenizer, an arm, and sequences that are
    longer than the model takes.
    """
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelSize) if hasattr(settings, f.name)}
    for name, own in (sizes | {"arm": default_of(settings, "arm"), "tokenizer": None}).items():
        held = getattr(settings, name)
        if settings.is_given(name) and held != own:
            raise SettingError(f"{name} is {held!r}, and init brings its own; it must be left out")
    if settings.seq_len > config.max_position_embeddings:
        raise SettingError(
            f"seq_len is {settings.seq_len}; it must be at most init's max_position_embeddings, "
            f"{config.max_position_embeddings}"
        )
    return dataclasses.replace(settings, **sizes, tokenizer=settings.init)
