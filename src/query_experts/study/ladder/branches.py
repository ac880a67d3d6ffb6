"""Trains one run of the ladder: a stable part with one learning rate, from which the decay of each budget branches off.

A branch equals the straight run of its budget bit for bit: up to the start of its decay, both do the same.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainerCallback

from query_experts.common.files import disk_errors_as_os_errors, require_space
from query_experts.data import Corpus
from query_experts.model import costs
from query_experts.study.callbacks import Pieces, StopRequest, TokenProgress
from query_experts.study.ladder.callbacks import KeepFork, ProgressFile, RoutingCurve
from query_experts.study.ladder.results import MIXED, LadderResult
from query_experts.study.ladder.settings import LOGS, Ladder, Run
from query_experts.study.measure import (
    bits_per_byte,
    callback_of,
    diverged_run,
    is_routed,
    losses_by_part,
    routing_load,
    routing_split,
)
from query_experts.study.results import Curve, ParameterCounts, Piece
from query_experts.study.settings import RunSettings
from query_experts.study.train import (
    build_trainer,
    close_progress_bar,
    last_checkpoint,
    new_model,
    run_callbacks,
    train_from,
    training_arguments,
)
from query_experts.training import GQETrainer

SAVES = LOGS // 2  # checkpoints in a whole run
CHECKPOINT_BYTES = 3 * 4  # of a parameter: the weight and Adam's two moments, float32
NOT_IN_RESULTS = {
    "out",
    "data",
    "validation",
    "cache_dir",
    "tokenizer",
    "stop_after_minutes",
    "kernels",
    "max_bytes",
    "report_to",
    "telemetry",
    "log_every",
    "peak_flops",
    "text_field",
    "fsdp_size",
    "tp_size",
    "rank_timeout_minutes",
    "activation_checkpointing",
    "keep",
}


@dataclass(frozen=True)
class Branch:
    """A run at one of its budgets.

    Args:
        ladder: The ladder.
        name: The ladder's name.
        run: The run.
        budget: The share of the rung's tokens.
        folder: The run's folder, for checkpoints of all its branches.
    """

    ladder: Ladder
    name: str
    run: Run
    budget: float
    folder: Path

    @property
    def whole(self) -> RunSettings:
        return self.ladder.run_settings(self.run)

    @property
    def settings(self) -> RunSettings:
        """The settings of the straight run of this budget."""
        return self.ladder.branch_settings(self.whole, self.budget)

    @property
    def own_folder(self) -> Path:
        return self.folder / f"{self.budget:.1%}"

    @property
    def forks(self) -> Path:
        """Where the ends of stable parts are kept, as checkpoints."""
        return self.folder / "forks"

    def train(
        self, model: PreTrainedModel, corpus: Corpus, stop: StopRequest, more: Sequence[TrainerCallback] = ()
    ) -> LadderResult | None:
        """Trains from the branch's last checkpoint on, else from the longest stable part that is kept, else anew.

        Args:
            model: A model of the run's arm and size, which gets the run's initial values.
            more: Callbacks beside those of every branch.

        Returns:
            None if it was asked to stop before its end, or a callback stopped it.
        """
        settings = self.settings
        require_space(self.own_folder, (3 + settings.keep) * CHECKPOINT_BYTES * model.num_parameters())
        model.load_state_dict(new_model(settings, self.run.arm, self.run.seed).state_dict())
        sample = routing_split(settings, corpus)
        trainer = self.trainer(settings, model, corpus, sample, stop)
        for callback in more:
            trainer.add_callback(callback)
        with disk_errors_as_os_errors(self.folder), close_progress_bar(trainer), stop.listening():
            train_from(trainer, self.latest_checkpoint(settings))
            if trainer.state.global_step < settings.steps and not diverged_run(trainer):
                return None
            return self.result(settings, trainer, corpus, sample)

    def latest_checkpoint(self, settings: RunSettings) -> Path | None:
        """The branch's own last checkpoint; else the last end of a stable part that isn't beyond its own."""
        own = last_checkpoint(self.own_folder / "checkpoints")
        if own is not None:
            return own
        stable = settings.steps - settings.decay_steps
        return last_checkpoint(self.forks, most=stable)

    def clear(self) -> None:
        """Removes the branch's own checkpoints, once its result is kept."""
        shutil.rmtree(self.own_folder, ignore_errors=True)

    def trainer(
        self, settings: RunSettings, model: PreTrainedModel, corpus: Corpus, sample: Subset, stop: StopRequest
    ) -> GQETrainer:
        """The Trainer of the branch, which logs and saves when the whole run does and never validates."""
        steps = self.whole.steps
        arguments = training_arguments(settings, self.run.seed, self.own_folder / "checkpoints")
        arguments = dataclasses.replace(
            arguments, eval_strategy="no", logging_steps=steps // LOGS, save_steps=steps // SAVES
        )
        callbacks = [
            *run_callbacks(settings, self.run.name, stop),
            RoutingCurve(steps // SAVES, settings.tokens_per_step, sample),
            KeepFork(settings.steps - settings.decay_steps, self.forks),
            ProgressFile(self.folder, self.budget),
        ]
        return build_trainer(settings, model, arguments, corpus, callbacks, None)

    def result(self, settings: RunSettings, trainer: GQETrainer, corpus: Corpus, sample: Subset) -> LadderResult:
        model, config = trainer.model, trainer.model.config
        progress, pieces = (callback_of(trainer, kind) for kind in (TokenProgress, Pieces))
        tokens = trainer.state.global_step * settings.tokens_per_step
        parts = [] if diverged_run(trainer) else losses_by_part(model, corpus, settings)
        diverged = not parts or not all(math.isfinite(part.loss) for part in parts)
        parts = [] if diverged else parts
        predicted = sum(part.predicted_tokens for part in parts)
        loss = bits = None
        facts, parameters = corpus.facts, ParameterCounts(**costs.parameters(model))
        if not diverged:
            loss = sum(part.loss * part.predicted_tokens for part in parts) / predicted
            bits = bits_per_byte(loss, facts.validation_tokens, facts.validation_bytes)
        where = [Piece(**piece) for piece in pieces.pieces]
        instructions = {piece.instructions for piece in where}
        return LadderResult(
            ladder=self.name,
            rung=self.run.rung,
            variant=self.run.variant,
            arm=self.run.arm,
            seed=self.run.seed,
            budget=self.budget,
            parameters=parameters.total,
            embedding_parameters=parameters.embedding,
            active_parameters=parameters.active,
            active_heads=costs.heads(config).active,
            train_tokens=tokens,
            flops=tokens / settings.seq_len * costs.model_work(config, 1, settings.seq_len, backward=True).flops,
            active_flops=3 * tokens * costs.flops_per_token(config, settings.seq_len),
            diverged_at_tokens=tokens if diverged else None,
            validation_loss=loss,
            bits_per_byte=bits,
            parts=parts,
            routing=routing_load(model, sample) if is_routed(model) and not diverged else None,
            routing_curve=RoutingCurve.points(trainer.state.log_history),
            curve=curve_at_logs(trainer.state.log_history, trainer.args.logging_steps, settings.tokens_per_step),
            settings=recorded_settings(settings, self.ladder),
            pieces=where,
            instructions=MIXED if len(instructions) > 1 else where[0].instructions or MIXED,
            train_seconds=round(progress.seconds, 1),
            tokens_per_s=round(progress.tokens_per_s, 1),
            data_hash=facts.data_hash,
            tag=self.ladder.tag,
        )  # fmt: skip


def curve_at_logs(logs: Sequence[dict[str, Any]], every: int, tokens_per_step: int) -> Curve:
    """The training loss at each log of a run that nobody stopped, at most `LOGS` points.

    A stop has a log of its own, which takes its steps out of the mean of the log that follows: they are joined again.
    """
    spans: dict[int, list[tuple[int, float]]] = {}
    last: dict[int, int] = {}
    before = 0
    for log in logs:
        if "lm_loss" in log:
            step, span = log["step"], -(-log["step"] // every)
            spans.setdefault(span, []).append((step - before, log["lm_loss"]))
            last[span] = before = step
    means = {last[span]: sum(n * loss for n, loss in own) / sum(n for n, _ in own) for span, own in spans.items()}
    return [(step * tokens_per_step, round(loss, 5)) for step, loss in means.items() if math.isfinite(loss)]


def recorded_settings(settings: RunSettings, ladder: Ladder) -> dict[str, Any]:
    """The settings of a run that its result holds: those that decide what is trained, and no path."""
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in NOT_IN_RESULTS}
    return kept | {"device": settings.torch_device, "dtype": settings.autocast_dtype(), "threads": ladder.threads}
