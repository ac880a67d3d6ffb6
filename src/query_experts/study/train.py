"""One training run of the study: an arm and a seed, from tokens to a result that the report can read."""

from __future__ import annotations

import json
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.utils.data import Subset
from transformers import PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from query_experts.common.files import disk_errors_as_os_errors, require_space, save_tokenizer, write_json
from query_experts.data import Corpus
from query_experts.distillation import DistillationTrainer, TopKSchedule
from query_experts.model.arms import arm_config, build
from query_experts.model.initialization import initialise_by_name
from query_experts.model.modeling_gqe import GQEForCausalLM
from query_experts.study.callbacks import (
    Pieces,
    StopAtDivergence,
    StopRequest,
    StopWhenAsked,
    TokenProgress,
    ZClipCallback,
    losses_are_finite,
)
from query_experts.study.results import describe, loss_of, read_result
from query_experts.study.settings import RunSettings
from query_experts.training import GQETrainer


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts that isn't an arm's: a converted model, and the dense one that it learns from, if any."""

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
) -> dict[str, Any] | None:
    """Train one arm, going on from its last checkpoint, and write model and result.json; None if asked to stop before.

    start: a model to go on from in place of an arm's own; `arm` is its name then.

    A finished run is read back, not trained again. A run whose loss is no longer finite ends there, and that is its
    result.
    """
    result_file = folder / "result.json"
    if result_file.exists():
        return read_result(result_file)
    if start is None:
        model = build(arm_config(arm, settings.model_size()))
        initialise_by_name(model, seed, model.config.initializer_range)
    else:
        model = start.model
    require_space(folder, 7 * 4 * model.num_parameters())  # weights, and two checkpoints with Adam's moments

    validation = held_out(settings, corpus)
    progress = TokenProgress(f"{arm} seed {seed}", settings.tokens_per_step)
    where = Pieces(settings.torch_device, settings.autocast_dtype())
    callbacks = [ZClipCallback(), progress, where, StopAtDivergence(), StopWhenAsked(stop)]
    arguments = training_arguments(settings, seed, folder / "checkpoints")
    checkpoint = last_checkpoint(folder / "checkpoints")
    kind: Callable[..., GQETrainer] = GQETrainer
    if start is not None:
        arguments.eval_on_start = checkpoint is None
        if start.sparsify_fraction:
            callbacks.append(TopKSchedule(model.config.active_query_experts, start.sparsify_fraction))
        if start.teacher is not None:
            kind = partial(DistillationTrainer, teacher=start.teacher, weight=start.distillation)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=trained_on(settings, corpus),
        eval_dataset=validation,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    with disk_errors_as_os_errors(folder), clean_up(trainer), stop.listening():
        train_on(trainer, checkpoint)
        if trainer.state.global_step < settings.steps and losses_are_finite(trainer.state.log_history):
            return None
        result = describe(settings, arm, seed, trainer, corpus, validation)
        if start is not None and start.teacher is not None:
            result["teacher_loss"] = loss_of(start.teacher, validation, settings)
        if result["diverged_at_tokens"] is None:
            model.save_pretrained(folder / "model")
            save_tokenizer(corpus.tokenizer, folder / "model")
    write_json(result_file, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


@contextmanager
def clean_up(trainer: GQETrainer) -> Iterator[None]:
    """Ends the progress bar's line whatever happens, so that an error has its own."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:  # resuming makes new ones
            if isinstance(callback, TokenProgress):
                callback.close()


def trained_on(settings: RunSettings, corpus: Corpus) -> Subset:
    """The sequences to train on, without the last few of which an epoch would end in a short step."""
    whole = len(corpus.train) // settings.sequences_per_step * settings.sequences_per_step
    return Subset(corpus.train, range(whole))


def held_out(settings: RunSettings, corpus: Corpus) -> Subset:
    """`validation_sequences` of the held-out sequences, or all where there are fewer, spread evenly over them."""
    there = len(corpus.validation)
    count = min(settings.validation_sequences, there)
    return Subset(corpus.validation, [i * there // count for i in range(count)])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. Those that a kill, a full disk or a bad one cut short are deleted, with a word."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    for path in sorted(found, key=lambda path: int(numbers[path]), reverse=True):
        if is_whole(path):
            return path
        print(f"{path} is damaged or lacks files, and is deleted; what is whole before it goes on.", file=sys.stderr)
        shutil.rmtree(path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer finished this checkpoint, and each of its files reaches to its end.

    Raises OSError where that can't be told, as a file that is there can't be read.
    """
    archives = {path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")}
    archives |= {checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME}
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # written last
        for weights in [*checkpoint.glob("*.safetensors")] or [checkpoint / SAFE_WEIGHTS_NAME]:
            with safe_open(weights, framework="pt"):
                pass
        for path in archives:
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    return False
    except (FileNotFoundError, ValueError, SafetensorError):
        return False
    return True


def train_on(trainer: GQETrainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint on. From one of the last step the Trainer itself would take one step more."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps:
            trainer.state = state
            trainer._load_from_checkpoint(str(checkpoint))
            trainer._load_callback_state()
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def training_arguments(settings: RunSettings, seed: int, folder: Path) -> TrainingArguments:
    """Fused AdamW, WSD and bf16 autocast, with the paper's betas, eps and weight decay (section 4)."""
    every = max(1, settings.steps // settings.evaluations)
    warmup = round(settings.warmup_fraction * settings.steps)
    decay = round(settings.decay_fraction * settings.steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "min_lr_ratio": settings.min_learning_rate_ratio},
        warmup_steps=warmup,
        max_grad_norm=0.0,  # ZClip clips
        bf16=settings.autocast_dtype() == "bfloat16",
        use_cpu=settings.torch_device == "cpu",
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        # checkpoints fall on logs, so that a resumed run logs the same means
        logging_steps=max(n for n in range(1, max(1, settings.steps // 50) + 1) if every % n == 0),
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several visible ones the first, not nn.DataParallel over all
    return arguments


def stop_after(minutes: float | None) -> StopRequest:
    return StopRequest(None if minutes is None else time.monotonic() + 60 * minutes)
