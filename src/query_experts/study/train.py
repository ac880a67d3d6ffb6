"""Trains one run of the study: an arm with a seed, from tokens to its result."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Subset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from query_experts.common.errors import SettingError
from query_experts.common.files import disk_errors_as_os_errors, parse_json, require_space, save_tokenizer, sync_files
from query_experts.data import Corpus
from query_experts.distillation import DistillationTrainer, TopKSchedule
from query_experts.distributed.checkpoints import FILES, barrier, damaged_files, has_shards
from query_experts.distributed.ranks import agreed, first_rank, is_first, naming_hung_ranks
from query_experts.model.arms import arm_config, build
from query_experts.model.initialization import initialise_by_name
from query_experts.model.kernel_choice import use_kernels
from query_experts.model.modeling_gqe import GQEForCausalLM
from query_experts.study.callbacks import (
    Pieces,
    StopAtDivergence,
    StopRequest,
    StopWhenAsked,
    TokenProgress,
    ZClipCallback,
)
from query_experts.study.measure import describe, diverged_run, loss_of, validation_split
from query_experts.study.results import RunResult, read_result, write_result
from query_experts.study.settings import RunSettings
from query_experts.study.sharded import load_sharded
from query_experts.telemetry import Telemetry
from query_experts.training import GQETrainer

MOST_COMPILED = 256  # shapes of models in one process
SHOWN_FILES = 3  # of those that a checkpoint lacks
INITIAL = "initial"  # the folder, in a run's, of a new model that ranks share


@dataclass(frozen=True)
class StartingPoint:
    """A converted model to train on from, in place of a new model of an arm.

    Args:
        teacher: The dense model that it learns from; None for the language-model loss only.
        distillation: Weight of the divergence from the teacher.
        sparsify_fraction: Share of the steps in which top-k falls to the model's own.
    """

    model: GQEForCausalLM
    teacher: PreTrainedModel | None
    distillation: float
    sparsify_fraction: float


def train_arm(
    settings: RunSettings,
    arm: str,
    seed: int,
    corpus: Corpus,
    folder: Path,
    stop: StopRequest,
    start: StartingPoint | None = None,
) -> RunResult | None:
    """Trains one arm from its last checkpoint on, and writes model and result.json.

    A finished run is read, not trained again. A run whose loss is no longer finite ends there; that is its result.
    Every rank calls this, and rank 0 writes.

    Args:
        start: A model to train on from; `arm` is its name then.

    Returns:
        The result; None if the run was asked to stop before its end.
    """
    with naming_hung_ranks(settings.rank_timeout):
        known = first_rank(lambda: finished(folder))
        return train_on(settings, arm, seed, corpus, folder, stop, start) if known is None else known


def finished(folder: Path) -> RunResult | None:
    """The result of a run that has ended, without what only an unfinished one needs; None for an unfinished one."""
    file = folder / "result.json"
    if not file.exists():
        return None
    remove_parts(folder)  # which a kill may have left
    return read_result(file)


def remove_parts(folder: Path) -> None:
    for name in ("checkpoints", INITIAL):
        shutil.rmtree(folder / name, ignore_errors=True)


def train_on(
    settings: RunSettings, arm: str, seed: int, corpus: Corpus, folder: Path, stop: StopRequest,
    start: StartingPoint | None,
) -> RunResult | None:  # fmt: skip
    """As `train_arm`, for a run that hasn't ended."""
    model = initial_model(settings, arm, seed, folder) if start is None else prepared(settings, start.model)
    use_kernels(model, settings.kernels)
    first_rank(lambda: require_space(folder, room_of(settings, model) - bytes_in(folder / "checkpoints")))
    checkpoint = first_rank(lambda: last_checkpoint(folder / "checkpoints"))
    if checkpoint is not None and is_first():
        print(f"{arm} seed {seed} goes on from {checkpoint}", file=sys.stderr)
    if settings.compile and is_first():
        print("The first step compiles the model, half a minute or more without progress.", file=sys.stderr)
    arguments = training_arguments(settings, seed, folder / "checkpoints")
    arguments.eval_on_start = start is not None and checkpoint is None
    arguments.run_name = f"{arm} seed {seed}"
    callbacks = [*run_callbacks(settings, arguments.run_name, stop), *telemetry(settings)]
    trainer = build_trainer(settings, model, arguments, corpus, callbacks, start)
    writing = disk_errors_as_os_errors(folder)
    with writing, close_progress_bar(trainer), loggers_of(trainer, folder), stop.listening():
        train_from(trainer, checkpoint)
        if trainer.state.global_step < settings.steps and not diverged_run(trainer):
            return None
        validation = validation_split(settings, corpus)
        result = describe(settings, arm, seed, trainer, corpus)
        if start is not None and start.teacher is not None:
            result = dataclasses.replace(result, teacher_loss=loss_of(start.teacher, validation, settings))
        if not result.diverged:
            save_model(model, corpus, folder / "model")
    barrier()
    if is_first():
        if not result.diverged:
            sync_files(folder / "model")
        write_result(folder / "result.json", result)
        remove_parts(folder)
    return agreed(result)


def room_of(settings: RunSettings, model: PreTrainedModel) -> int:
    """Bytes of a run's checkpoints, one more while the oldest is deleted, and of its model.

    A checkpoint has the weights and Adam's moments. Of shards it has a tied head's weights twice.
    """
    weights = model.num_parameters()
    if settings.is_sharded and model.config.tie_word_embeddings:
        weights += model.config.vocab_size * model.config.hidden_size
    return 4 * (weights + (weights + 2 * model.num_parameters()) * (settings.keep + 1))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_model(model: PreTrainedModel, corpus: Corpus, folder: Path) -> None:
    """Writes an ordinary checkpoint. Every rank must call this: each may have a part of the model."""
    model.save_pretrained(folder, is_main_process=is_first())
    if is_first():
        save_tokenizer(corpus.tokenizer, folder)


def initial_model(settings: RunSettings, arm: str, seed: int, folder: Path) -> PreTrainedModel:
    """A model of an arm with its initial values, which the ranks share as the settings say."""
    if not settings.is_sharded:
        return new_model(settings, arm, seed)
    first_rank(lambda: write_initial(settings, arm, seed, folder / INITIAL))
    return prepared(settings, load_sharded(AutoModelForCausalLM, str(folder / INITIAL), settings))


def write_initial(settings: RunSettings, arm: str, seed: int, folder: Path) -> None:
    """Writes the checkpoint that ranks read their parts of a new model from, unless it is there."""
    if folder.exists():  # of a run that goes on
        return
    model = built(settings, arm, seed)
    require_space(folder.parent, 4 * model.num_parameters())
    writing = folder.with_name(f"{folder.name}.writing")
    model.save_pretrained(writing)
    sync_files(writing)
    writing.replace(folder)


def new_model(settings: RunSettings, arm: str, seed: int) -> PreTrainedModel:
    """A model of an arm with its initial values, compiled when it is first called if the settings ask for it."""
    return prepared(settings, built(settings, arm, seed))


def built(settings: RunSettings, arm: str, seed: int) -> PreTrainedModel:
    model = build(arm_config(arm, settings.model_size()))
    initialise_by_name(model, seed, model.config.initializer_range)
    return model


def prepared(settings: RunSettings, model: PreTrainedModel) -> PreTrainedModel:
    """The model, compiled when it is first called and with activations computed again, if the settings ask for it.

    A sharded model is compiled layer by layer, as its layers are gathered one by one.
    """
    if settings.activation_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # of earlier Transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        # Dynamo counts compilations of one class over all models; past its limit it runs eager without an error
        torch._dynamo.config.recompile_limit = MOST_COMPILED
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for part in model.model.layers if settings.is_sharded else [model]:
            part.compile(dynamic=False)
    return model


def run_callbacks(settings: RunSettings, name: str, stop: StopRequest) -> list[TrainerCallback]:
    """The callbacks of every run. name: the title of its progress bar."""
    return [
        ZClipCallback(),
        TokenProgress(name, settings.tokens_per_step),
        Pieces(settings.torch_device, settings.autocast_dtype()),
        StopAtDivergence(),
        StopWhenAsked(stop, settings.rank_timeout),
    ]


def telemetry(settings: RunSettings) -> list[TrainerCallback]:
    """The callback that watches a run, unless the settings want none."""
    if settings.telemetry == "none":
        return []
    return [Telemetry(settings.telemetry == "detailed", settings.peak_flops)]


def build_trainer(
    settings: RunSettings,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    corpus: Corpus,
    callbacks: list[TrainerCallback],
    start: StartingPoint | None,
) -> GQETrainer:
    """The Trainer of a run: plain, or with the schedule and the teacher of its starting point."""
    kind: Callable[..., GQETrainer] = GQETrainer
    if start is not None and start.sparsify_fraction:
        callbacks = [*callbacks, TopKSchedule(model.config.active_query_experts, start.sparsify_fraction)]
    if start is not None and start.teacher is not None:
        kind = partial(DistillationTrainer, teacher=start.teacher, weight=start.distillation)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=training_split(settings, corpus),
        eval_dataset=validation_split(settings, corpus),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def close_progress_bar(trainer: GQETrainer) -> Iterator[None]:
    """Ends the line of the progress bar, so that an error message has its own line."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:  # resuming replaces them
            if isinstance(callback, TokenProgress):
                callback.close()


@contextmanager
def loggers_of(trainer: GQETrainer, folder: Path) -> Iterator[None]:
    """Lets loggers write into the run's folder, and ends them with the run: the next of a comparison has its own."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # no TENSORBOARD_LOGGING_DIR
            callback.logging_dir = str(folder / "tensorboard")
    if "wandb" not in trainer.args.report_to:
        yield
        return
    import wandb

    try:
        yield
    except wandb.errors.UsageError as error:  # such as no key
        raise SettingError(
            f"report_to holds 'wandb', which can't be used: {error}; log in (wandb login), or set WANDB_MODE=offline"
        ) from error
    finally:
        wandb.finish()


def training_split(settings: RunSettings, corpus: Corpus) -> Subset:
    """The training sequences of whole steps; the rest would end each epoch in a shorter step."""
    whole = len(corpus.train) // settings.sequences_per_step * settings.sequences_per_step
    return Subset(corpus.train, range(whole))


def last_checkpoint(folder: Path, most: float = math.inf) -> Path | None:
    """The newest complete checkpoint. Deletes newer ones that a kill or a full disk cut short, and prints that.

    Args:
        most: The last step whose checkpoint counts.
    """
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path, number in numbers.items() if number.isdecimal() and int(number) <= most]
    for path in sorted(found, key=lambda path: int(numbers[path]), reverse=True):
        if (faults := faults_of(path)) is None:
            return path
        print(
            f"{path} is damaged or lacks files{named(faults)}, and is deleted; the run goes on from the last "
            "complete checkpoint.",
            file=sys.stderr,
        )
        shutil.rmtree(path)
    return None


def faults_of(checkpoint: Path) -> list[str] | None:
    """The files of a checkpoint that are missing or damaged, of any rank, as far as they can be named; None for none.

    Raises OSError for a file that is there and can't be read.
    """
    archives = {path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")} | {checkpoint / SCHEDULER_NAME}
    if not has_shards(checkpoint):
        archives.add(checkpoint / OPTIMIZER_NAME)
    try:
        if damaged := damaged_files(checkpoint):
            return damaged
    except ValueError:
        return [FILES]
    try:
        parse_json((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # written last
        for weights in [*checkpoint.glob("*.safetensors")] or [checkpoint / SAFE_WEIGHTS_NAME]:
            with safe_open(weights, framework="pt"):
                pass
        for path in archives:
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    return [path.name]
    except (FileNotFoundError, ValueError, SafetensorError):
        return []
    return None


def named(files: list[str]) -> str:
    return f" ({', '.join(files[:SHOWN_FILES])}{', ...' if len(files) > SHOWN_FILES else ''})" if files else ""


def train_from(trainer: GQETrainer, checkpoint: Path | None) -> None:
    """Trains from a checkpoint on. With a checkpoint of the last step, the Trainer itself would train one step more."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps:
            trainer.state = state
            trainer._load_from_checkpoint(str(checkpoint))
            trainer._load_callback_state()
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def training_arguments(settings: RunSettings, seed: int, folder: Path) -> TrainingArguments:
    """Fused AdamW, the WSD schedule and bf16 autocast; betas, eps and weight decay of the paper (section 4)."""
    every = max(1, settings.steps // settings.evaluations)
    log_every = settings.log_every or max(1, settings.steps // 50)
    # Accelerate would rather believe what `accelerate launch` has put into the environment
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"):
        os.environ.pop(name, None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.micro_batches,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": settings.decay_steps, "min_lr_ratio": settings.min_learning_rate_ratio},
        warmup_steps=settings.warmup_steps,
        max_grad_norm=0.0,  # ZClip clips
        bf16=settings.autocast_dtype() == "bfloat16",
        use_cpu=settings.torch_device == "cpu",
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=settings.keep,
        # checkpoints fall on logs, so that a resumed run logs the same means
        logging_steps=max(n for n in range(1, log_every + 1) if every % n == 0),
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[*settings.report_to],
        log_level="error",
        # only without the router's losses may a router get no gradient, which DDP must be told
        ddp_find_unused_parameters=not (settings.router_aux_loss_coef or settings.router_z_loss_coef),
        logging_nan_inf_filter=False,  # which would log another number in place of a loss that isn't finite
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # the first visible GPU; the Trainer would use nn.DataParallel on all
    return arguments


def stop_after(minutes: float | None) -> StopRequest:
    """A request to stop that many minutes from now; None for no deadline."""
    return StopRequest(None if minutes is None else time.monotonic() + 60 * minutes)
