"""Trains GQE and dense models with Transformers' Trainer: exact weights of the router's losses, comparable losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from query_experts import liger
from query_experts.distributed.checkpoints import WholeCheckpoints
from query_experts.layers.balance import BalanceWindow


class LoggedCallback(TrainerCallback):
    """A callback that adds to what `GQETrainer` logs of training."""

    def add_to_logs(self, trainer: GQETrainer, logs: dict[str, float]) -> None:
        """Adds numbers to a log, on every rank, after a step and before the loggers get it.

        Args:
            trainer: The Trainer that logs.
            logs: What it has so far, with `loss`.
        """
        raise NotImplementedError


class GQETrainer(WholeCheckpoints):
    """Transformers' Trainer for GQE models and dense models, with its training loop unchanged.

    It differs from the stock Trainer, which also trains GQE models, in three ways:

    - Each micro-batch of a GQE model gets `num_tokens_in_batch`: the step's real tokens over all micro-batches and
      ranks. So the balance loss is weighted exactly. (The stock Trainer weights it by labels.)
    - It also logs the language-model loss without the router's losses, as `lm_loss`, and reports it as `eval_loss`. So
      losses of models with and without a router are comparable. Both are in nats per token. For a classifying head this
      is the task's loss, logged as `task_loss`. Beside it stand `aux_loss` and `z_loss`, without their coefficients,
      and what each `LoggedCallback` adds. All are means over the steps since the last log.

    Args:
        *args: as for Transformers' Trainer.
        **kwargs: as for Transformers' Trainer.

    Raises:
        ImportError: for `use_liger_kernel` without liger-kernel.
        ValueError: for label smoothing and `compute_loss_func`, which replace the model's loss, and for several GPUs
            in one process (nn.DataParallel), and for pipeline and context parallelism.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func replace the model's loss, and with it the router's; they "
                "must be 0 and None"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process; nn.DataParallel is not supported: launch one "
                "process a GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES"
            )
        refuse_parallelism(self)
        self._evaluation: EvaluatedRows | None = None
        if self.args.use_liger_kernel:
            liger.register()
            if is_gqe(self.model):
                liger.check_config(self.args.liger_kernel_config or {})
        # for a dense model; outputs of a GQE model tell
        self._logged_as = "lm_loss" if getattr(self.model, "can_generate", lambda: True)() else "task_loss"
        self._begin_interval()

    def _begin_interval(self) -> None:
        """Begins what is counted from one log to the next: losses, and `positions`, this rank's tokens with padding."""
        self._loss_sums: dict[tuple[str, ...], Tensor] = {}  # names -> their sums, a scalar or [names]
        self._interval_step, self._interval_state = self.state.global_step, self.state
        self._balance_window = balance_window_of(self.model)
        self.positions = 0
        self.row_length = 0  # tokens in a row of the last batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self._interval_state is not self.state:  # each call of `train`, and each retry of auto_find_batch_size
            self._begin_interval()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is not None and is_gqe(self.model):  # else the Trainer averages micro-batches
            tokens = torch.tensor(sum(count_tokens(batch) for batch in batches), device=device)
            if self.args.average_tokens_across_devices:
                tokens = self.accelerator.reduce(tokens, "sum")
            tokens = tokens // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
            for batch in batches:
                batch["num_tokens_in_batch"] = tokens
        for batch in batches:
            if (positions := positions_of(batch)) is not None:
                self.positions, self.row_length = self.positions + positions.numel(), positions.shape[-1]
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        lm_loss = self.lm_loss(outputs, num_items_in_batch)
        if model.training:
            self.add_up((self._logged_as,), lm_loss, num_items_in_batch)
            if self._balance_window is not None and self._balance_window.losses is not None:
                self.add_up(("aux_loss", "z_loss"), self._balance_window.losses, num_items_in_batch)
        else:
            loss = lm_loss * self.num_averaging_ranks(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; on several ranks the loss counts each row once, though the last batch repeats some."""
        self._evaluation = EvaluatedRows.of(self, dataloader)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._evaluation is not None and self._evaluation.losses:
            output.metrics[f"{prefix}_loss"] = self._evaluation.mean()
        self._evaluation = None
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        if self._evaluation is None or labels is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        rows = self._evaluation.next_rows(labels.shape[0])
        own = without_repeats(inputs, rows.here)
        predicted = super().prediction_step(model, own, *args, **kwargs)
        self._evaluation.add(self._mean_over_ranks(predicted[0].detach(), own["labels"]), rows.together)
        return predicted

    def _mean_over_ranks(self, loss: Tensor, labels: Tensor) -> Tensor:
        """A batch's loss over all ranks, from a rank's: its share of it, or the mean over its own labels [B, T]."""
        if self.args.average_tokens_across_devices:
            return self.accelerator.reduce(loss, "mean")
        own = labels[..., 1:].ne(-100).sum().to(loss)
        total = torch.where(own > 0, loss * own, 0)  # the mean over no label is NaN
        total, labelled = self.accelerator.reduce(torch.stack([total, own]), "sum")
        return total / labelled

    def add_up(self, names: tuple[str, ...], losses: Tensor, num_items_in_batch: Any) -> None:
        """Adds a micro-batch's losses, in the scale of `lm_loss`, to the means that are logged under their names."""
        part = losses.detach() / self.averaged_losses(num_items_in_batch)
        self._loss_sums[names] = self._loss_sums[names] + part if names in self._loss_sums else part

    def lm_loss(self, outputs: Any, num_items_in_batch: Any) -> Tensor:
        """The model's loss without the router's losses and without the factor `num_averaging_ranks`."""
        for name in ("lm_loss", "task_loss"):
            if outputs.get(name) is not None:
                self._logged_as = name
                return outputs[name]
        return outputs["loss"] / self.num_averaging_ranks(num_items_in_batch)

    def num_averaging_ranks(self, num_items_in_batch: Any) -> int:
        """Ranks over which gradients are averaged although the loss is divided by the whole step's items.

        The Trainer multiplies such a loss by this number.
        """
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            return self.accelerator.num_processes // self.get_tp_size()
        return 1

    def averaged_losses(self, num_items_in_batch: Any) -> int:
        """Micro-batches, over all ranks, whose mean is the step's loss; 1 where the step's items divide each loss."""
        if num_items_in_batch is not None:
            return 1
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return self.current_gradient_accumulation_steps * ranks

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if self._loss_sums:
                logs |= self._mean_losses()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LoggedCallback):
                    callback.add_to_logs(self, logs)
            self._begin_interval()
        super().log(logs, *args, **kwargs)

    def _mean_losses(self) -> dict[str, float]:
        """Name -> mean of a loss over all ranks and the steps since the last log."""
        steps = max(1, self.state.global_step - self._interval_step)
        names = [name for group in self._loss_sums for name in group]
        sums = [value.reshape(-1) for value in self._loss_sums.values()]
        # each summand is its share of the step's mean: the sum over ranks and micro-batches is one per step
        totals = self.accelerator.reduce(torch.cat([value.to(sums[0]) for value in sums]), "sum")
        ranks = self.get_tp_size()  # tensor-parallel ranks all count the same loss
        if not self.args.average_tokens_across_devices:  # then each rank's losses add up to its own mean
            ranks *= self.accelerator.num_processes // self.get_tp_size()
        return {name: total / ranks / steps for name, total in zip(names, totals.tolist(), strict=True)}


@dataclass(frozen=True)
class Rows:
    """Rows of a batch of all ranks that aren't repeats of others: on this rank, and together."""

    here: int
    together: int


@dataclass
class EvaluatedRows:
    """The losses of an evaluation on several ranks, whose loader fills the last batches with rows of the first ones.

    Args:
        rows: All that there are.
        ranks: Those with rows of their own.
        rank: The number of this one among them.
    """

    rows: int
    ranks: int
    rank: int
    seen: int = 0
    losses: list[tuple[Tensor, int]] = field(default_factory=list)

    @classmethod
    def of(cls, trainer: GQETrainer, dataloader: Any) -> EvaluatedRows | None:
        """For an evaluation of tokens in rows of a known number; None for any other, and in one process."""
        data, tp_size = getattr(dataloader, "dataset", None), trainer.get_tp_size()
        processes = trainer.accelerator.num_processes
        if processes == 1 or not has_length(data) or isinstance(data, IterableDataset):
            return None
        assert data is not None
        if not trainer.model_accepts_loss_kwargs or trainer._logged_as != "lm_loss":
            return None
        rank = trainer.accelerator.process_index // tp_size
        return cls(len(data), processes // tp_size, rank)

    def next_rows(self, batch_size: int) -> Rows:
        """Those of the next batch, of which each rank has so many rows."""
        left = self.rows - self.seen
        self.seen += batch_size * self.ranks
        here = left - self.rank * batch_size
        return Rows(max(0, min(here, batch_size)), min(left, batch_size * self.ranks))

    def add(self, loss: Tensor, rows: int) -> None:
        """loss: the mean over a batch of all ranks, and the number of its rows."""
        self.losses.append((loss, rows))

    def mean(self) -> float:
        return sum(float(loss) * rows for loss, rows in self.losses) / sum(rows for _, rows in self.losses)


def without_repeats(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Inputs of which only the first `rows` rows have labels."""
    if rows >= inputs["labels"].shape[0]:
        return inputs
    labels = inputs["labels"].clone()
    labels[rows:] = -100
    return {**inputs, "labels": labels}


def refuse_parallelism(trainer: GQETrainer) -> None:
    """Raises ValueError for pipeline and context parallelism, which would train another model or other losses."""
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    sizes = {
        "pp_size": (getattr(config, "pp_size", 1), "pipeline parallelism"),
        "cp_size": (trainer.get_cp_size(), "context parallelism"),
        "sp_size": (trainer.get_sp_size(), "context parallelism (Ulysses)"),
    }
    for name, (size, kind) in sizes.items():
        if size != 1:
            raise ValueError(f"{name} is {size}; GQETrainer doesn't support {kind}, so it must be 1")
    if trainer.get_tp_size() > 1 and not trainer.args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices is False, by which ranks count what they share twice; with "
            "tensor parallelism it must be True"
        )


def is_gqe(model: nn.Module) -> bool:
    """Whether a model, or the one that it wraps, is a GQE model, as far as its configuration tells."""
    return getattr(getattr(model, "config", None), "model_type", None) == "gqe"


def balance_window_of(model: nn.Module) -> BalanceWindow | None:
    """The window in which a GQE model, or one that is wrapped, counts selections; None without one."""
    windows = (getattr(module, "balance_window", None) for module in model.modules())
    return next((window for window in windows if window is not None), None)


def count_tokens(batch: dict[str, Any]) -> int:
    """Number of real tokens in a batch: those that its 2D attention mask keeps, or all."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int(mask.ne(0).sum())
    positions = positions_of(batch)
    return 0 if positions is None else positions.numel()


def positions_of(batch: Any) -> Tensor | None:
    """A tensor [B, T] with an element for each token of a batch, padding included; None for a batch without tokens."""
    if not isinstance(batch, Mapping):
        return None
    embeddings = batch.get("inputs_embeds")
    return batch.get("input_ids") if embeddings is None else embeddings[..., 0]
