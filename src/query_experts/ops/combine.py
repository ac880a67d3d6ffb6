"""Combines the heads' outputs into the slots that W_O takes.

Shapes: B batch, T tokens, G groups, k selected experts in a group, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_TOKENS = 8  # up to this many, calling a matrix product costs more than its work


def weighted_slot(routed_BTGkd: Tensor, scores_BTGk: Tensor) -> Tensor:
    """The weighted slot [B, T, d]: sum over groups and selected experts of w * o, with w = p / sum of all selected p.

    routed: outputs o of the selected experts, [B, T, G, k, d]. scores: their probabilities p, float32 or float64
    [B, T, G, k]. The sum in the denominator runs over all groups (arXiv 2606.20945, section 3).
    """
    weights = scores_BTGk / scores_BTGk.sum((-2, -1), keepdim=True)
    if not torch.compiler.is_compiling() and routed_BTGkd.shape[1] <= FEW_TOKENS:
        return (weights[..., None] * routed_BTGkd).sum((2, 3)).to(routed_BTGkd.dtype)
    rows = routed_BTGkd.flatten(2, 3)  # [B, T, G*k, d]
    return (weights.to(rows.dtype).flatten(2).unsqueeze(2) @ rows).squeeze(2)
