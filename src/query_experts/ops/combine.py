"""Combines the heads' outputs into the slots that W_O takes.

Shapes: B batch, T tokens, G groups, k selected experts in a group, d head dim.
"""

from __future__ import annotations

from torch import Tensor


def weighted_slot(routed_BTGkd: Tensor, log_scores_BTGk: Tensor | None) -> Tensor:
    """The weighted slot [B, T, d]: sum over groups and selected experts of w * o, with w = p / sum of all selected p.

    routed: outputs o of the selected experts, [B, T, G, k, d]. log_scores: the logarithms of their probabilities p,
    float32 or float64 [B, T, G, k]; None where all are the same. The sum in the denominator runs over all groups
    (arXiv 2606.20945, section 3), so w is the softmax of all of a token's log p, even where every p underflows.

    The weights are normalised in the dtype of the scores. Weights and products are rounded to the dtype of the outputs,
    because a wide product of the size of all outputs would be the layer's largest tensor; the sum isn't rounded before
    its end.
    """
    if log_scores_BTGk is None:
        return routed_BTGkd.mean((2, 3))
    weights = weights_of_selected(log_scores_BTGk).to(routed_BTGkd.dtype)
    return (weights.flatten(2)[..., None] * routed_BTGkd.flatten(2, 3)).sum(2)


def weights_of_selected(log_scores_BTGk: Tensor) -> Tensor:
    """w = p / sum of all selected p, [B, T, G, k], from log p."""
    return log_scores_BTGk.flatten(2).softmax(-1).view_as(log_scores_BTGk)
