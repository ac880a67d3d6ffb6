"""Trainer callbacks: ZClip, a progress bar in tokens, where a run was trained, and when it stops."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from query_experts.common.environment import environment, instructions
from query_experts.distributed.ranks import greatest, num_processes, require_all_ranks, stops_after
from query_experts.model.kernel_choice import kernel_choice
from query_experts.training import GQETrainer, LoggedCallback

WAITS_FOR_LOG = 10  # seconds that a request to stop waits for a log


class ZClipCallback(LoggedCallback, ExportableState):
    """ZClip (arXiv 2504.02507): scales gradients down where their norm is an outlier among recent norms.

    The first `warmup_steps` norms pass unclipped and give the mean and variance, which then are exponential moving
    averages. A norm g with z = (g - mean) / std above `z_threshold` is scaled to mean + (z_threshold**2 / z) * std.
    A larger outlier is scaled down further. The averages take the scaled norm. Works on gradients of DDP, FSDP2 and
    tensor parallelism.

    Where the norm isn't finite, the step is skipped: the gradients are dropped, on every rank, since all know the same
    norm. Ten such steps in a row, or half of a shorter run's, stop the training.

    `GQETrainer` logs the norm after clipping as `grad_norm_clipped`, beside the Trainer's `grad_norm`, and the steps
    that were clipped so far as `clipped_steps`.

    Args:
        alpha: Decay of the moving averages.
        z_threshold: The z-score above which a norm is an outlier.
        warmup_steps: Steps without clipping.

    Raises:
        ValueError: When training begins, for fp16, whose gradients are still scaled, and for a `max_grad_norm` other
            than 0, with which the Trainer would clip too.
    """

    MOST_SKIPPED = 10

    def __init__(self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25):
        self.alpha = alpha
        self.z_threshold = z_threshold
        self.warmup_steps = warmup_steps
        self.warmup_norms: list[float] = []
        self.mean: float | None = None
        self.variance = 0.0
        self.clipped_steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.gave_up = False
        self.clipped_norm = math.nan  # of the last step

    def state(self) -> dict[str, Any]:
        return {
            "args": {"alpha": self.alpha, "z_threshold": self.z_threshold, "warmup_steps": self.warmup_steps},
            "attributes": {
                "warmup_norms": self.warmup_norms,
                "mean": self.mean,
                "variance": self.variance,
                "clipped_steps": self.clipped_steps,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "gave_up": self.gave_up,
            },
        }

    def target_norm(self, norm: float) -> float:
        """The norm to scale a gradient of this norm to: the same unless it is an outlier. Updates the averages."""
        if not math.isfinite(norm):
            return norm
        if self.mean is None:
            self.warmup_norms.append(norm)
            if len(self.warmup_norms) == self.warmup_steps:
                self.mean = sum(self.warmup_norms) / self.warmup_steps
                self.variance = sum((n - self.mean) ** 2 for n in self.warmup_norms) / self.warmup_steps
                self.warmup_norms = []
            return norm
        std = math.sqrt(self.variance)
        z = (norm - self.mean) / (std + 1e-6)
        target = self.mean + self.z_threshold**2 / z * std if z > self.z_threshold else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * target
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (target - self.mean) ** 2
        return target

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.fp16:
            raise ValueError("fp16 is True; ZClip needs unscaled gradients, so it must be False (use bf16)")
        if args.max_grad_norm:
            raise ValueError(f"max_grad_norm is {args.max_grad_norm}; ZClip clips in its place, so it must be 0")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        if not parameters:
            raise ValueError("ZClip finds no gradients in the parameters (DeepSpeed keeps its own); it can't clip")

        norm = total_norm(parameters)
        if not math.isfinite(norm):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            for p in parameters:
                p.grad = None
            self.clipped_norm = norm
            return
        self.skipped_in_a_row = 0
        target = self.clipped_norm = self.target_norm(norm)
        if target < norm:
            self.clipped_steps += 1
            for p in parameters:
                p.grad.mul_(target / norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.gave_up = self.skipped_in_a_row >= min(self.MOST_SKIPPED, max(1, state.max_steps // 2))
        if self.gave_up:
            control.should_training_stop = True
        return control

    def add_to_logs(self, trainer: GQETrainer, logs: dict[str, float]) -> None:
        logs |= {
            "grad_norm_clipped": self.clipped_norm,
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
        }


def total_norm(parameters: list[torch.nn.Parameter]) -> float:
    """The norm of all gradients, over all ranks' shards; what several ranks have alike counts once."""
    of_mesh: dict[Any, list[Any]] = {}
    for p in parameters:
        of_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p.grad)
    norms = []
    for gradients in of_mesh.values():
        norm = torch.nn.utils.get_total_norm(gradients)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds of wall-clock time; of the process's own time where it computes on one thread."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


class TokenProgress(TrainerCallback, ExportableState):
    """A progress bar with tokens, tokens/s, time left and the last losses, and the time that training steps take.

    `seconds` counts training steps without validation and checkpoints, over all pieces of a resumed run; on one thread
    of a CPU it is the process's own time, which a pause or other work doesn't lengthen.
    `tokens_per_s` leaves out the first steps of each piece, in which the process warms up, unless there are no others.
    The rate in the bar includes validation, because its time left must.

    Args:
        name: Title of the bar.
        tokens_per_step: Over all micro-batches and ranks.
    """

    WARM_UP_STEPS = 2

    def __init__(self, name: str, tokens_per_step: int):
        self.name = name
        self.tokens_per_step = tokens_per_step
        self.seconds = 0.0
        self.warm_steps = 0
        self.warm_seconds = 0.0
        self.cold_steps = 0
        self.piece_began_at = 0
        self.started = 0.0
        self.bar: tqdm | None = None

    def state(self) -> dict[str, Any]:
        return {
            "args": {"name": self.name, "tokens_per_step": self.tokens_per_step},
            "attributes": {
                "seconds": self.seconds,
                "warm_steps": self.warm_steps,
                "warm_seconds": self.warm_seconds,
                "cold_steps": self.cold_steps,
            },
        }

    @property
    def tokens_per_s(self) -> float:
        if self.warm_steps:
            return self.warm_steps * self.tokens_per_step / self.warm_seconds
        return self.cold_steps * self.tokens_per_step / self.seconds

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.piece_began_at = state.global_step
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(
            total=state.max_steps * self.tokens_per_step,
            initial=state.global_step * self.tokens_per_step,
            desc=self.name,
            unit="tok",
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = clock(args.device)()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        elapsed = clock(args.device)() - self.started
        self.seconds += elapsed
        if state.global_step - self.piece_began_at > self.WARM_UP_STEPS:
            self.warm_steps += 1
            self.warm_seconds += elapsed
        else:
            self.cold_steps += 1
        self.draw(lambda bar: bar.update(self.tokens_per_step))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        shown = {"loss": "lm_loss", "validation": "eval_loss"}
        values = {name: f"{logs[key]:.3f}" for name, key in shown.items() if key in logs}
        if self.bar is not None and values:
            self.bar.set_postfix(values, refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.draw(lambda bar: bar.close())
        self.bar = None

    def draw(self, change: Callable[[tqdm], Any]) -> None:
        """Changes the bar. Training goes on without it once the pipe that it writes to is closed."""
        if self.bar is not None:
            try:
                change(self.bar)
            except OSError:
                self.bar.disable = True
                self.bar = None
                with suppress(RuntimeError, AssertionError):  # not held
                    tqdm.get_lock().release()  # tqdm keeps it where writing fails, and other threads' bars would wait


class StopRequest:
    """A request to save and stop: made at the deadline, or by Ctrl-C or SIGTERM within `listening`.

    `signal` is the number of the signal that came, or None.

    Args:
        deadline: On the clock of `time.monotonic`; None for none.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = math.inf if deadline is None else deadline
        self.signal: int | None = None

    @property
    def made(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline

    @property
    def presses(self) -> bool:
        """Whether it was made so long ago that it can't wait for a log: who asks may soon end the process."""
        return time.monotonic() >= self.deadline + WAITS_FOR_LOG

    def share(self) -> None:
        """Has every rank know of a signal that one has got. Every rank must call this."""
        self.signal = int(greatest(self.signal or 0, torch.device("cpu"))) or None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM makes the request, the second ends the process. Ignored signals stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: Any) -> None:
            if self.signal is not None:
                if number == signal.SIGTERM and num_processes() > 1:
                    return  # a launcher passes it on, so it may come to a rank twice
                restore()
                signal.raise_signal(number)
                return
            self.signal = number
            self.deadline = min(self.deadline, time.monotonic())
            with suppress(OSError):  # Ctrl-C also ends the program that reads the pipe
                alone = f"within {WAITS_FOR_LOG} seconds or after this step"
                when = alone if num_processes() == 1 else "after this step or the next"
                more = "" if number == signal.SIGTERM and num_processes() > 1 else "; once more stops at once"
                print(f"\nSaving {when}, then stopping{more}.", file=sys.stderr)

        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, ask)
        try:
            yield
        finally:
            restore()


class StopWhenAsked(TrainerCallback):
    """Saves a checkpoint and stops at the first log after the request, on all ranks once it is made on one.

    Where no log comes within `WAITS_FOR_LOG` seconds, it stops after a step, with a log of its own; for a signal on
    several ranks, after the step that follows. Who asks may kill a process that doesn't end soon. A signal that one
    rank got is then in every rank's request.

    Args:
        request: Of this rank.
        rank_timeout: Seconds after which a rank that doesn't come to a log is named, and the others end.
    """

    def __init__(self, request: StopRequest, rank_timeout: float = 1800.0):
        self.request = request
        self.rank_timeout = rank_timeout

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        # a stop between two logs would lose a part of the mean that lm_loss is
        if state.global_step >= state.max_steps:
            return control
        if state.global_step % state.logging_steps:
            presses = self.request.presses
            if num_processes() > 1:
                presses = stops_after(state.global_step, presses or self.request.signal is not None)
            if presses:
                self.request.share()
                control.should_log = control.should_save = control.should_training_stop = True
            return control
        require_all_ranks(self.rank_timeout)
        if greatest(self.request.made, args.device):
            self.request.share()
            control.should_save = True
            control.should_training_stop = True
        return control


class StopAtDivergence(TrainerCallback):
    """Stops when a validation loss is no longer a finite number, from which training can't recover."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if not validations_are_finite(state.log_history[-1:]):
            control.should_training_stop = True
        return control


def validations_are_finite(logs: list[dict[str, Any]]) -> bool:
    """Whether every validation loss that the Trainer logged is finite."""
    return all(math.isfinite(value) for log in logs for name, value in log.items() if name == "eval_loss")


def has_diverged(callbacks: list[TrainerCallback], logs: list[dict[str, Any]]) -> bool:
    """Whether a validation loss wasn't finite, or ZClip gave up."""
    return not validations_are_finite(logs) or any(isinstance(c, ZClipCallback) and c.gave_up for c in callbacks)


class Pieces(TrainerCallback, ExportableState):
    """Records where a run is trained: its first step, environment and kernels, and again whenever they change."""

    def __init__(self, device: str, dtype: str):
        self.device = device
        self.dtype = dtype
        self.pieces: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        return {"args": {"device": self.device, "dtype": self.dtype}, "attributes": {"pieces": self.pieces}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        choice = kernel_choice(model)
        here = dataclasses.asdict(environment(self.device, self.dtype)) | {
            "instructions": instructions(self.device),
            "kernels": None if choice is None else dataclasses.asdict(choice),
        }
        if not self.pieces or {**self.pieces[-1], **here} != self.pieces[-1]:
            self.pieces = [*self.pieces, {"first_step": state.global_step, **here}]
