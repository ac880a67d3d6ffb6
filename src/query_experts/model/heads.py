"""Classification and question answering on a GQE decoder: Transformers' generic heads, with the router's losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from query_experts.layers.balance import BalanceWindow
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.modeling_gqe import GQEPreTrainedModel, KeptLogits
from query_experts.model.router_losses import RouterLosses, real_tokens


@dataclass
class GQESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of `GQEForSequenceClassification`.

    Attributes:
        loss: the training loss: the task's loss and the router's losses.
        task_loss: the task's loss only; this is the validation loss.
        aux_loss: the balance loss, summed over layers; only with `output_router_logits`.
        router_logits: float32 [B*T, N], one tensor per layer; only with `output_router_logits`.
    """

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class GQETokenClassifierOutput(TokenClassifierOutput):
    """Output of `GQEForTokenClassification`; its attributes are those of `GQESequenceClassifierOutput`."""

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class GQEQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Output of `GQEForQuestionAnswering`; its attributes are those of `GQESequenceClassifierOutput`."""

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class RoutedHead(RouterLosses):
    """Adds the router's losses to a generic head's loss. It stands before the generic class among the bases."""

    output_class: type

    def __init__(self, config: GQEConfig):
        super().__init__(config)  # type: ignore[call-arg]
        self.balance_window = BalanceWindow()

    def _forward(
        self,
        answers: Tensor | None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        """The generic head's forward.

        Args:
            answers: what the labels are counted on; -100 is none, but a number of a regression. None without labels.
            output_router_logits: add `router_logits` and `aux_loss` to the output.
            num_items_in_batch: labels of the optimizer step; the loss is then this micro-batch's share of the step's.
            num_tokens_in_batch: real tokens of the optimizer step, over micro-batches and ranks.
            **inputs: for the generic head, and through it for the decoder.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routed = self.config.routing != "none" and (answers is not None or output_router_logits)
        tokens, kept = None, KeptLogits()
        if routed:  # before the cache is updated
            new = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
            tokens = real_tokens(inputs["attention_mask"], new, inputs["past_key_values"])
        outputs = dict(
            super().forward(**inputs, output_router_logits=routed, kept=kept, return_dict=True)  # type: ignore[misc]
        )

        items = aux_loss = None
        loss = task_loss = outputs.pop("loss", None)
        if answers is not None:
            items = (answers.ne(-100) | answers.is_floating_point()).sum()
            if num_items_in_batch is not None:  # a micro-batch without labels has no mean
                step_items = torch.as_tensor(num_items_in_batch, device=items.device).clamp(min=1)
                task_loss = torch.where(items > 0, task_loss, 0.0) * (items / step_items)
            loss = task_loss.clone()  # the Trainer scales `loss` in place
        if routed:
            aux_loss, router_loss = self._router_losses(
                kept.logits, tokens, items, num_items_in_batch, num_tokens_in_batch
            )
            if loss is not None:
                loss = loss + router_loss.to(loss.device, loss.dtype)
        return self.output_class(
            loss=loss,
            task_loss=task_loss,
            aux_loss=aux_loss if output_router_logits else None,
            router_logits=kept.logits if output_router_logits else None,
            **outputs,
        )


class LabelledHead(RoutedHead):
    """A head whose answers are `labels`."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Llama's forward, with the router's losses in the loss.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in `GQEForCausalLM`.
            labels: of a sequence [B], classes as int64, or numbers for a regression; [B, num_labels] for several of
                either. Of tokens int64 [B, T], -100 for a token without a class.
            **kwargs: `output_router_logits` and `num_tokens_in_batch` as in `GQEForCausalLM`.

        Raises:
            ValueError: for several sequences to classify where the configuration has no `pad_token_id`.
        """
        return self._forward(
            labels, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, **kwargs,
        )  # fmt: skip


class GQEForSequenceClassification(LabelledHead, GenericForSequenceClassification, GQEPreTrainedModel):
    """A GQE decoder that classifies a sequence by its last token. loss = classification loss + the router's losses."""

    output_class = GQESequenceClassifierOutput


class GQEForTokenClassification(LabelledHead, GenericForTokenClassification, GQEPreTrainedModel):
    """A GQE decoder that classifies each token. loss = classification loss + the router's losses."""

    output_class = GQETokenClassifierOutput


class GQEForQuestionAnswering(RoutedHead, GenericForQuestionAnswering, GQEPreTrainedModel):
    """A GQE decoder that finds the span of an answer. loss = mean loss of its two ends + the router's losses."""

    output_class = GQEQuestionAnsweringOutput

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the other heads; start_positions and end_positions: int64 [B], tokens of a row."""
        answers = start_positions if end_positions is not None else None
        return self._forward(
            answers, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, start_positions=start_positions,
            end_positions=end_positions, **kwargs,
        )  # fmt: skip


AutoModelForSequenceClassification.register(GQEConfig, GQEForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(GQEConfig, GQEForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(GQEConfig, GQEForQuestionAnswering, exist_ok=True)
