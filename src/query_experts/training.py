"""Trains GQE and dense models with Transformers' Trainer: exact weights of the router's losses, comparable losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from query_experts import liger
from query_experts.distributed.checkpoints import WholeCheckpoints


class GQETrainer(WholeCheckpoints):
    """Transformers' Trainer for GQE models and dense models, with its training loop unchanged.

    It differs from the stock Trainer, which also trains GQE models, in three ways:

    - Each micro-batch of a GQE model gets `num_tokens_in_batch`: the step's real tokens over all micro-batches and
      ranks. So the balance loss is weighted exactly. (The stock Trainer weights it by labels.)
    - It also logs the language-model loss without the router's losses, as `lm_loss`, and reports it as `eval_loss`. So
      losses of models with and without a router are comparable. Both are in nats per token. For a classifying head this
      is the task's loss, logged as `task_loss`.

    Args:
        *args: as for Transformers' Trainer.
        **kwargs: as for Transformers' Trainer.

    Raises:
        ImportError: for `use_liger_kernel` without liger-kernel.
        ValueError: for label smoothing and `compute_loss_func`, which replace the model's loss, and for several GPUs
            in one process (nn.DataParallel).
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
        if self.args.use_liger_kernel:
            liger.register()
            if is_gqe(self.model):
                liger.check_config(self.args.liger_kernel_config or {})
        # for a dense model; outputs of a GQE model tell
        self._logged_as = "lm_loss" if getattr(self.model, "can_generate", lambda: True)() else "task_loss"
        self._lm_loss_sum: Tensor | None = None
        self._lm_loss_step = 0
        self._lm_loss_state = self.state

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is not None and is_gqe(self.model):  # else the Trainer averages micro-batches
            tokens = torch.tensor(sum(count_tokens(batch) for batch in batches), device=device)
            if self.args.average_tokens_across_devices:
                tokens = self.accelerator.reduce(tokens, "sum")
            tokens = tokens // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
            for batch in batches:
                batch["num_tokens_in_batch"] = tokens
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        lm_loss = self.lm_loss(outputs, num_items_in_batch)
        if model.training:
            # each call of `train`, and each retry of auto_find_batch_size, has a state of its own
            if self._lm_loss_sum is None or self._lm_loss_state is not self.state:
                self._lm_loss_sum, self._lm_loss_step = torch.zeros_like(lm_loss), self.state.global_step
                self._lm_loss_state = self.state
            self._lm_loss_sum += lm_loss.detach() / self.averaged_losses(num_items_in_batch)
        else:
            loss = lm_loss * self.num_averaging_ranks(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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
        if "loss" in logs and self._lm_loss_sum is not None:
            steps = max(1, self.state.global_step - self._lm_loss_step)
            # each summand is its share of the step's mean: the sum over ranks and micro-batches is one per step
            total = self.accelerator.reduce(self._lm_loss_sum, "sum").item()
            total /= self.get_tp_size()  # tensor-parallel ranks all count the same loss
            if not self.args.average_tokens_across_devices:  # then each rank's losses add up to its own mean
                total /= self.accelerator.num_processes // self.get_tp_size()
            logs[self._logged_as] = total / steps
            self._lm_loss_sum = None
        super().log(logs, *args, **kwargs)


def is_gqe(model: nn.Module) -> bool:
    """Whether a model, or the one that it wraps, is a GQE model, as far as its configuration tells."""
    return getattr(getattr(model, "config", None), "model_type", None) == "gqe"


def count_tokens(batch: dict[str, Any]) -> int:
    """Number of real tokens in a batch: those that its 2D attention mask keeps, or all."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int(mask.ne(0).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else batch["inputs_embeds"][..., 0].numel()
