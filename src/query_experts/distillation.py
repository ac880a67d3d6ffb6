"""Makes a converted model sparse: trains it on a dense teacher's predictions, and lowers k step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from query_experts.distributed.checkpoints import is_sharded
from query_experts.training import GQETrainer


class DistillationTrainer(GQETrainer):
    """A `GQETrainer` that also trains the model to predict what a dense teacher predicts.

    The loss is (1 - weight) * language-model loss + weight * KL(teacher || model) + the router's losses, in nats per
    token. Validation uses only the language-model loss, as in GQETrainer.

    A row may hold several documents, each with `position_ids` from 0 on. Such a row may be padded on the right. An
    attention mask that hides other tokens of such a row raises ValueError, because with it a stock teacher would attend
    across documents.

    It logs the divergence from the teacher as `kd_loss`.

    Args:
        *args: as for Transformers' Trainer.
        **kwargs: as for Transformers' Trainer.
        teacher: a causal language model with the same vocabulary. Its logits are computed without gradients. It is set
            to eval mode, and moved to the model's device unless it is quantised, sharded or spread over devices.
        weight: of the divergence, 0 to 1.

    Raises:
        TypeError: for a teacher that is no model of Transformers.
        ValueError: for a weight out of range, a teacher with another vocabulary, and a quantised teacher on another
            device; while training, for a mask as above.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weight: float = 0.9, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not hasattr(teacher, "config"):
            raise TypeError(f"teacher is {teacher!r}; it must be a causal language model")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; it must be 0 to 1")
        teacher_vocabulary, vocabulary = teacher.config.vocab_size, self.model.config.vocab_size
        if teacher_vocabulary != vocabulary:
            raise ValueError(f"teacher has a vocabulary of {teacher_vocabulary}; it must be the model's, {vocabulary}")
        spread = len(set((getattr(teacher, "hf_device_map", None) or {}).values())) > 1
        placed = spread or is_sharded(teacher)
        if not (placed or getattr(teacher, "is_quantized", False)):
            teacher.to(self.args.device)
        elif not placed and (device := next(teacher.parameters()).device).type != self.args.device.type:
            raise ValueError(f"teacher is quantised and on {device}; it must be loaded onto {self.args.device}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]  # the call below may remove them
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.weight:
            with torch.no_grad(), self.accelerator.autocast():
                batch = teacher_inputs(inputs, separates_documents=self.model.config.model_type == "gqe")
                teacher_logits = self.teacher(**batch, use_cache=False).logits
            logits = outputs["logits"]
            kl = divergence(logits, teacher_logits.to(logits.device), labels, num_items_in_batch)
            self.add_up(("kd_loss",), kl, num_items_in_batch)
            lm_loss = self.lm_loss(outputs, num_items_in_batch)
            loss = loss + self.weight * (kl - lm_loss) * self.num_averaging_ranks(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def teacher_inputs(inputs: dict[str, Any], separates_documents: bool) -> dict[str, Any]:
    """The inputs of a batch that a stock model takes. It separates the documents of a row only without a mask.

    separates_documents: whether the student always separates them, as GQE does. Raises ValueError if the teacher can't.
    """
    batch = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if separates_documents and mask is not None and mask.ndim == 2 and positions is not None:
        real = mask != 0
        if not (real[:, 1:] & ~real[:, :-1]).any():  # padding, if any, is on the right, where causality hides it
            del batch["attention_mask"]
        elif (positions.diff().expand_as(real[:, 1:]).ne(1) & between_real(real)).any():
            raise ValueError(
                "attention_mask hides tokens before others and position_ids restart within a row, so that a teacher "
                "can't separate the documents; rows must be padded on the right, or position_ids left out"
            )
    return batch


def between_real(real: Tensor) -> Tensor:
    """Which pairs of neighbours lie between a row's first and last real token: bool [B, T] -> bool [B, T - 1]."""
    begun, to_come = (x.long().cummax(-1).values.bool() for x in (real, real.flip(-1)))
    return begun[:, :-1] & to_come.flip(-1)[:, 1:]


def divergence(logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """KL(teacher || model) in nats, summed over predicted tokens and divided by `num_items`; if None, by their number.

    logits, teacher_logits: [B, T, V]. labels: int64 [B, T], -100 where a token isn't predicted, as in the model's loss.
    """
    predicted = labels[:, 1:].ne(-100)
    log_probs, teacher_log_probs = (x[:, :-1][predicted].float().log_softmax(-1) for x in (logits, teacher_logits))
    total = F.kl_div(log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return total / (predicted.sum().clamp(min=1) if num_items is None else num_items)


class TopKSchedule(TrainerCallback):
    """Lowers k from all M experts to `top_k`, one by one, in equal parts of the first steps.

    The last step always has `top_k`. Validation and checkpoints in between use the k of their step.

    Args:
        top_k: the final k, 1 to M.
        fraction: share of the steps in which k falls, 0 or more and below 1.

    Raises:
        ValueError: for a fraction out of range; when training begins, for a `top_k` that the model can't have.
    """

    def __init__(self, top_k: int, fraction: float):
        if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(f"fraction is {fraction!r}; it must be a number, 0 or more and below 1")
        self.top_k = top_k
        self.fraction = fraction

    def at(self, step: int, steps: int, experts: int) -> int:
        """k at a step, counted from 0, of `steps` steps, with M = `experts`."""
        decrements = experts - self.top_k
        falling_steps = min(round(self.fraction * steps), steps - 1)
        return experts - (decrements if step >= falling_steps else decrements * step // falling_steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config = kwargs["model"].config
        experts = config.num_attention_heads // config.num_key_value_heads
        if not 1 <= self.top_k <= experts:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 to {experts}, the experts in a group")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        config = model.config
        top_k = self.at(state.global_step, state.max_steps, config.num_attention_heads // config.num_key_value_heads)
        if top_k != config.active_query_experts:
            model.set_top_k(top_k)
