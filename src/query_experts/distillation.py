"""Making a converted model sparse: k falls from all experts to a few, while it learns a dense teacher's predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from query_experts.training import GQETrainer


class DistillationTrainer(GQETrainer):
    """`GQETrainer` whose loss is (1 - weight) * language-model loss + weight * KL(teacher || model) + router's losses.

    teacher: a causal language model of the same vocabulary, whose logits are computed beside, without gradients. It is
    put in eval mode and on the model's device, unless it is quantised or spread over several. weight: 0 to 1, of the
    divergence. Validation is by the language-model loss alone, as in GQETrainer.

    Rows that hold several documents, as `position_ids` that begin anew tell, may be padded on the right. An attention
    mask that hides other tokens of such rows raises ValueError: by it, a stock teacher would look across documents.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weight: float = 0.9, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not hasattr(teacher, "config"):
            raise TypeError(f"teacher is {teacher!r}; it must be a causal language model")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; it must be 0 to 1")
        theirs, ours = teacher.config.vocab_size, self.model.config.vocab_size
        if theirs != ours:
            raise ValueError(f"teacher has a vocabulary of {theirs}; it must be the model's, {ours}")
        spread = len(set((getattr(teacher, "hf_device_map", None) or {}).values())) > 1
        if not (spread or getattr(teacher, "is_quantized", False)):
            teacher.to(self.args.device)
        elif not spread and (held := next(teacher.parameters()).device).type != self.args.device.type:
            raise ValueError(f"teacher is quantised and on {held}; it must be loaded onto {self.args.device}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]  # the model may take them out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.weight:
            with torch.no_grad(), self.accelerator.autocast():
                seen = teacher_inputs(inputs, apart=self.model.config.model_type == "gqe")
                teacher_logits = self.teacher(**seen, use_cache=False).logits
            logits = outputs["logits"]
            kl = divergence(logits, teacher_logits.to(logits.device), labels, num_items_in_batch)
            lm_loss = self.lm_loss(outputs, num_items_in_batch)
            loss = loss + self.weight * (kl - lm_loss) * self.num_averaging_ranks(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def teacher_inputs(inputs: dict[str, Any], apart: bool) -> dict[str, Any]:
    """The inputs that a stock model takes. Documents of a row are kept apart by it only where no mask is given.

    apart: whether the student keeps them apart in any case, as GQE does.
    """
    seen = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
    mask, positions = seen.get("attention_mask"), seen.get("position_ids")
    if apart and mask is not None and mask.ndim == 2 and positions is not None:
        real = mask != 0
        if not (real[:, 1:] & ~real[:, :-1]).any():  # padded on the right or not at all: causality hides it
            del seen["attention_mask"]
        elif (positions.diff().expand_as(real[:, 1:]).ne(1) & within(real)).any():
            raise ValueError(
                "attention_mask hides tokens before others and position_ids begin anew within a row; a teacher can't "
                "tell documents apart then: rows must be padded on the right, or position_ids left out"
            )
    return seen


def within(real: Tensor) -> Tensor:
    """Which neighbours lie between a row's first real token and its last: bool [B, T] -> [B, T - 1]."""
    begun, to_come = (x.long().cummax(-1).values.bool() for x in (real, real.flip(-1)))
    return begun[:, :-1] & to_come.flip(-1)[:, 1:]


def divergence(logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """KL(teacher || model) in nats, summed over predicted tokens and divided by num_items; None: by their number.

    logits, teacher_logits: [B, T, V]; labels: [B, T], -100 where a token isn't predicted, as in the model's own loss.
    """
    predicted = labels[:, 1:].ne(-100)
    ours, theirs = (x[:, :-1][predicted].float().log_softmax(-1) for x in (logits, teacher_logits))
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / (predicted.sum().clamp(min=1) if num_items is None else num_items)


class TopKSchedule(TrainerCallback):
    """k falls from all M experts to `top_k`, one by one, in equal parts of the first `fraction` of the steps.

    fraction: 0 or more and below 1. The last step is always of `top_k`. Validation and checkpoints in between are of
    the k of that moment. Raises ValueError for another fraction, and for a k that the model can't have.
    """

    def __init__(self, top_k: int, fraction: float):
        if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(f"fraction is {fraction!r}; it must be a number, 0 or more and below 1")
        self.top_k = top_k
        self.fraction = fraction

    def at(self, step: int, steps: int, experts: int) -> int:
        """k at a step of so many, with M = `experts`."""
        falls = experts - self.top_k
        falling = min(round(self.fraction * steps), steps - 1)
        return experts - (falls if step >= falling else falls * step // falling)

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
