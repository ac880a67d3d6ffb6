"""Attention of a few new tokens over a long cache: routed heads and the shared head at one read of the cache.

The shared head is linear in the KV heads that it averages: q . mean_g(K_g) = mean_g(q . K_g), and
P mean_g(V_g) = mean_g(P V_g). So routed and shared queries share one batched product with K and one with V, the
cache holds G heads and not one byte more, and no mean over it is ever formed.

Shapes: B batch, G groups, k routed queries in a group, T new tokens, S keys, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from query_experts.ops.dtypes import wide


def shared_decode(
    routed_BGkTd: Tensor,
    shared_BTd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends with the routed heads and the shared head.

    Args:
        routed_BGkTd: queries of the selected experts.
        shared_BTd: queries of the shared head.
        key_BGSd: keys.
        value_BGSd: values.
        mask: [B or 1, 1, T, S], boolean (True: visible) or additive; None where every key is visible.
        scaling: factor of the scores.
        dropout: of the weights; 0 outside of training.

    Returns:
        Outputs of the routed heads [B, G, k, T, d] and of the shared head [B, T, d], and the weights
        [B, G, k+1, T, S]: the last of a group's are the shared head's, the same in every group. Scores and softmax are
        float32 (float64 for float64). A query to which a boolean mask leaves no key gives zeros, as in sdpa.
    """
    B, G, k, T, d = routed_BGkTd.shape
    queries = torch.cat([routed_BGkTd, shared_BTd.view(B, 1, 1, T, d).expand(B, G, 1, T, d)], 2) * scaling
    scores = (queries.view(B, G, (k + 1) * T, d) @ key_BGSd.mT).unflatten(2, (k + 1, T))
    scores = scores.to(wide(scores.dtype))
    shared_scores = scores.select(2, k)  # [B, G, T, S]
    shared_scores.copy_(shared_scores.mean(1, keepdim=True))
    if mask is not None and mask.dtype == torch.bool:  # filled in, as a score may have overflowed
        scores = torch.where(mask[:, None], scores, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores += mask[:, None]
    # softmax once for all groups' shared heads, which costs no more than taking them apart would
    weights = scores.softmax(-1).to(value_BGSd.dtype)
    if dropout:
        kept = F.dropout(torch.ones_like(weights), dropout)
        kept[:, :, k] = kept[:, :1, k]  # one shared head
        weights = weights * kept
    out = (weights.flatten(2, 3) @ value_BGSd).unflatten(2, (k + 1, T))
    if mask is not None and mask.dtype == torch.bool:
        out = out * mask.any(-1)[:, None, :, :, None]
    return out.narrow(2, 0, k), out.select(2, k).mean(1), weights
