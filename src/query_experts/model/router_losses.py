"""The router's losses within a model's loss: those of the global batch, at the micro-batch's share of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from query_experts.layers.balance import BalanceWindow, balance_loss, routing_statistics
from query_experts.layers.masks import padding_mask
from query_experts.model.configuration_gqe import GQEConfig


class RouterLosses:
    """Part of a model that adds the router's losses to its loss.

    In training the balance loss is that of the global batch. Its f, the fraction of tokens that selected each expert,
    is summed over data-parallel ranks. Where the Trainer passes `num_items_in_batch`, it is also summed over the
    micro-batches of the optimizer step so far. Its weight is the micro-batch's share of the step's tokens: exact where
    `num_tokens_in_batch` is passed, as `GQETrainer` does; else the share of the labels. So for a given f, the gradient
    doesn't depend on how a batch is split.
    """

    base_model: Any
    config: GQEConfig
    training: bool
    balance_window: BalanceWindow

    def _router_losses(
        self,
        router_logits: tuple[Tensor, ...],
        token_mask: Tensor | None,
        num_items: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        num_tokens_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor]:
        """The balance loss, summed over layers, and what both losses add to the loss. Scalars.

        Args:
            router_logits: [B*T, N], one tensor per layer.
            token_mask: [B, T], nonzero for real tokens; None for all.
            num_items: labels of this micro-batch, as the Trainer counts them; None without labels.
            num_items_in_batch: those of the step.
            num_tokens_in_batch: real tokens of the step.
        """
        config = self.config
        top_k = [layer.self_attn.top_k for layer in self.base_model.layers[: len(router_logits)]]
        statistics = routing_statistics(router_logits, config.num_key_value_heads, top_k, token_mask)
        here = statistics.tokens.clamp(min=1)
        items = total = None  # this micro-batch's and the step's tokens, or else labels
        if num_tokens_in_batch is not None:
            items, total = statistics.tokens, num_tokens_in_batch
        elif num_items_in_batch is not None and num_items is not None:
            items, total = num_items.to(here), num_items_in_batch

        if total is not None:
            total = torch.as_tensor(total, device=here.device, dtype=here.dtype)
        selected, tokens = statistics.selected, statistics.tokens
        if self.training:
            window_items = items if items is not None else tokens
            selected, tokens, window_items = sum_over_ranks(selected, tokens, window_items)
            if total is not None:
                ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
                selected, tokens = self.balance_window.add(selected, tokens, window_items, total * ranks)
        share = items / total.clamp(min=1) if items is not None and total is not None else 1.0
        balance = balance_loss(selected / tokens.clamp(min=1), statistics.prob_sum / here)
        z_loss = statistics.z_sum.sum() / here
        if self.training:
            self.balance_window.losses = share * torch.stack([balance, z_loss]).detach()
        return balance, share * (config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss)


def predicted_tokens(labels: Tensor, shift_labels: Tensor | None = None, **_: Any) -> Tensor:
    """Number of labels [B, T] that a causal model predicts: each but the first, and those that aren't -100."""
    return (shift_labels if shift_labels is not None else labels[..., 1:]).ne(-100).sum()


def real_tokens(attention_mask: Any, tokens: Any, past_key_values: Any) -> Tensor | None:
    """The columns [B, T] of a [B or 1, S] attention mask for the new tokens; None where all tokens are real.

    tokens: ids [B, T] or embeddings [B, T, D]; None, which the decoder refuses. past_key_values: a cache without them,
    or None.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or tokens is None:
        return None
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    attention_mask = padding_mask(attention_mask, tokens.shape[0])
    if isinstance(past, int) and attention_mask.shape[1] < past + tokens.shape[1]:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; it must have one for each of the {past} cached and "
            f"{tokens.shape[1]} new tokens"
        )
    return attention_mask[:, torch.arange(tokens.shape[1], device=attention_mask.device) + past]


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """Each tensor summed over the process group. Replicas (tensor parallel) cancel in f."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
