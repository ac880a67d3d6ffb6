"""Combines the heads' outputs into the slots that W_O takes.

Shapes: B batch, T tokens, G groups, k selected experts in a group, d head dim.
"""

from __future__ import annotations

from torch import Tensor


def weighted_slot(routed_BTGkd: Tensor, scores_BTGk: Tensor) -> Tensor:
    """The weighted slot [B, T, d]: sum over groups and selected experts of w * o, with w = p / sum of all selected p.

    routed: outputs o of the selected experts, [B, T, G, k, d]. scores: their probabilities p, float32 or float64
    [B, T, G, k]. The sum in the denominator runs over all groups (arXiv 2606.20945, section 3).

    The weights are normalised in the dtype of the scores. Weights and products are rounded to the dtype of the outputs,
    because a wide product of the size of all outputs would be the layer's largest tensor; the sum isn't rounded before
    its end.
    """
    weights = scores_BTGk / scores_BTGk.sum((-2, -1), keepdim=True)
    return (weights.to(routed_BTGkd.dtype)[..., None] * routed_BTGkd).sum((2, 3))
