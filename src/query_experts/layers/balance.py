"""Load balancing: the router's losses, and the selection counts of an optimizer step that they need."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from query_experts.layers.router import select_top_k

DEAD_BELOW = 0.01  # an expert that a smaller share of tokens selects is dead


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over tokens that the router's losses are computed from. They add up over micro-batches and ranks."""

    selected: Tensor  # [L, G, M] tokens that selected each expert; no gradient
    prob_sum: Tensor  # [L, G, M] sum of router probabilities
    z_sum: Tensor  # [L] sum over tokens of the squared logsumexp of the logits, mean over groups
    tokens: Tensor  # scalar, counted tokens


def routing_statistics(
    router_logits: tuple[Tensor, ...], num_groups: int, top_k: int | Sequence[int], token_mask: Tensor | None
) -> RoutingStatistics:
    """Counts one forward pass.

    Args:
        router_logits: L tensors [B*T, N], float32 or float64, one per layer.
        num_groups: G.
        top_k: k, or the k of each layer.
        token_mask: [B, T], nonzero where a token counts, or None for all.
    """
    device, dtype = router_logits[0].device, router_logits[0].dtype
    count = token_mask.reshape(-1).to(device).ne(0).to(dtype) if token_mask is not None else None
    selected, prob_sum, z_sum = [], [], []
    top_ks = top_k if isinstance(top_k, Sequence) else [top_k] * len(router_logits)
    for logits, k in zip(router_logits, top_ks, strict=True):
        grouped = logits.to(device).unflatten(-1, (num_groups, -1))  # [B*T, G, M]
        probs = grouped.softmax(-1)
        chosen = selected_experts(grouped.detach(), k).to(dtype)  # [B*T, G, M]
        z = grouped.logsumexp(-1).square().mean(-1)  # [B*T]
        if count is not None:
            chosen, probs, z = chosen * count[:, None, None], probs * count[:, None, None], z * count
        selected.append(chosen.sum(0))
        prob_sum.append(probs.sum(0))
        z_sum.append(z.sum())
    tokens = count.sum() if count is not None else prob_sum[0].new_tensor(router_logits[0].shape[0])
    return RoutingStatistics(torch.stack(selected), torch.stack(prob_sum), torch.stack(z_sum), tokens)


def selected_experts(logits: Tensor, top_k: int) -> Tensor:
    """1 for each expert that a token selects, else 0: logits [..., M] -> int64 [..., M]."""
    return F.one_hot(select_top_k(logits, top_k), logits.shape[-1]).sum(-2)


def relative_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax over its maximum, log M: logits [..., M] -> [...]. 1 is undecided, 0 is certain.

    1 for M = 1.
    """
    num_experts = logits.shape[-1]
    if num_experts == 1:
        return logits.new_ones(logits.shape[:-1])
    probs = logits.softmax(-1)
    return -(probs * probs.clamp_min(1e-12).log()).sum(-1) / math.log(num_experts)


def balance_loss(selected_fraction: Tensor, mean_probs: Tensor) -> Tensor:
    """M * sum_m f_m P_m inside each group, mean over groups, sum over layers (section 3; Switch, arXiv 2101.03961).

    Args:
        selected_fraction: f, [L, G, M], the fraction of tokens that selected each expert; sums to k over a group.
        mean_probs: P, [L, G, M], the mean router probability.

    Returns:
        A scalar.
    """
    num_experts = selected_fraction.shape[-1]
    return num_experts * (selected_fraction * mean_probs).sum(-1).mean(-1).sum()


class BalanceWindow:
    """Counts the selections of the current optimizer step, so that f spans its micro-batches.

    Every optimizer step empties every window. Torch doesn't see a step that a gradient scaler skips, or one of an
    optimizer that isn't torch's. There the counts tell: all micro-batches of a step carry the same total
    (`num_items_in_batch`), and their items add up to it. A new step begins when the total changes or would be exceeded.
    Nothing is read back to the host, so the window works under `torch.compile` and needs no synchronisation.

    Attributes:
        so_far: selected [L, G, M] and tokens, items, total (scalars) of the step's micro-batches so far, all ranks
            together; None before the first, and where no total is known.
        losses: [2], the last training pass's balance loss and z-loss, weighted by its share of the step; no gradient.
            None before the first.
    """

    live: ClassVar[weakref.WeakSet[BalanceWindow]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.so_far: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.losses: Tensor | None = None
        self.live.add(self)
        _empty_windows_after_optimizer_steps()

    def __getstate__(self) -> dict[str, Any]:
        return {"so_far": None}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc] # copies begin empty

    def add(self, selected: Tensor, tokens: Tensor, items: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one micro-batch.

        Args:
            selected: [L, G, M], tokens of the micro-batch that selected each expert.
            tokens: scalar, its tokens.
            items: scalar, its items in the unit that the Trainer counts (tokens or labels).
            total: scalar, items of the whole step. On R ranks, which sum their items, it is R times what the Trainer
                says: the Trainer may have counted a rank's own batch, and replicas count theirs R times. So where
                torch sees no step and totals are equal, up to R steps add up.

        Returns:
            selected [L, G, M] and tokens (scalar) of the step so far, this micro-batch included.
        """
        before = self.so_far
        if before is not None and (before[0].shape, before[0].device) == (selected.shape, selected.device):
            selected_before, tokens_before, items_before, total_before = before
            continues = (total_before == total) & (items_before + items <= total)
            selected = selected + torch.where(continues, selected_before, 0.0)
            tokens = tokens + torch.where(continues, tokens_before, 0.0)
            items = items + torch.where(continues, items_before, 0.0)
        self.so_far = selected, tokens, items, total
        return selected, tokens


@cache
def _empty_windows_after_optimizer_steps() -> None:
    def empty(*_: Any) -> None:
        for window in BalanceWindow.live:
            window.so_far = None

    register_optimizer_step_post_hook(empty)
