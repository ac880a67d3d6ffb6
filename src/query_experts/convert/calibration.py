"""Fits the initial router to how strong each head of the dense model is on some text.

Shapes: R rows (tokens), D hidden size, N query heads in G groups of M, k active per group, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from query_experts.layers.router import select_top_k

HELD_OUT = 5  # every fifth sequence is held out and judges the fit
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of the features' mean sum of squares over all rows
ROWS = 4096  # rows processed at a time, to save memory


@dataclass(frozen=True)
class Fit:
    """A fitted router, and how good it is on held-out tokens. (These also chose its ridge.)

    The shares are of the heads' squared strengths.

    Attributes:
        weight: the router's weight, float32 [N, D].
        kept: share of the experts that the router selects.
        best: share of the k strongest experts of each group and token, which no router can exceed.
        fixed: share of the k experts of each group that are strongest on average.
    """

    weight: Tensor
    kept: float
    best: float
    fixed: float


def contributions(heads: Tensor, o_proj: Tensor) -> Tensor:
    """How much each head adds to the layer's output: the norm of its output times its columns of W_O.

    heads: the heads' outputs [R, N, d]; o_proj [D, N*d]. -> float32 [R, N]
    """
    blocks = o_proj.float().unflatten(1, (heads.shape[1], -1)).transpose(0, 1)  # [N, D, d]
    gram = blocks.mT @ blocks  # [N, d, d]: gives the norm without a vector of D numbers
    squares = []
    for part in heads.split(ROWS):
        rows = part.float().transpose(0, 1)  # [N, R, d]
        squares.append(((rows @ gram) * rows).sum(-1).T)
    return torch.cat(squares).clamp(min=0).sqrt()


def fit_router(x: Tensor, strength: Tensor, groups: int, top_k: int, held_out: Tensor) -> Fit:
    """Fit the linear map whose softmax comes nearest to each head's share of its group's strength.

    It is ridge regression on the logarithm of strength, minus its mean over the group. So the router's probabilities
    are proportional to strength. Of several ridges the one that keeps most on the held-out rows is taken.

    Args:
        x: the layer's normed input [R, D].
        strength: how strong each head is for each token, such as its contribution [R, N].
        groups: G.
        top_k: the k that the fit is judged by.
        held_out: which rows judge the fit, bool [R].
    """
    strength = strength.float()
    target = strength.clamp(min=1e-6).log().unflatten(1, (groups, -1))
    target = (target - target.mean(-1, keepdim=True)).flatten(1)  # [R, N]
    gram, moment = (x.new_zeros(x.shape[1], n, dtype=torch.float64) for n in (x.shape[1], target.shape[1]))
    for x_part, target_part in zip(x[~held_out].split(ROWS), target[~held_out].split(ROWS), strict=True):
        features = x_part.double()
        gram += features.T @ features
        moment += features.T @ target_part.double()
    scale = gram.diagonal().mean()
    held_out_strength, held_out_x = strength[held_out], x[held_out].float()
    candidates = []
    for ridge in RIDGES:
        weight = torch.linalg.solve(gram + ridge * scale * torch.eye(len(gram), device=x.device), moment).T.float()
        candidates.append((kept_share(held_out_strength, F.linear(held_out_x, weight), groups, top_k), weight))
    kept, weight = max(candidates, key=lambda candidate: candidate[0])
    mean_square = strength[~held_out].square().mean(0)
    return Fit(
        weight=weight,
        kept=kept,
        best=kept_share(held_out_strength, held_out_strength, groups, top_k),
        fixed=kept_share(held_out_strength, mean_square.expand_as(held_out_strength), groups, top_k),
    )


def kept_share(strength: Tensor, score: Tensor, groups: int, top_k: int) -> float:
    """Share of squared strength [R, N] of the k experts with the highest scores [R, N] in each group."""
    squares = strength.double().square().unflatten(1, (groups, -1))
    selected = select_top_k(score.unflatten(1, (groups, -1)), top_k)
    return float(squares.gather(-1, selected).sum() / squares.sum().clamp(min=1e-30))


def importance(strength: Tensor) -> Tensor:
    """Mean squared strength of each head, [R, N] -> float64 [N]."""
    return strength.double().square().mean(0)


def rank_shares(score: Tensor, groups: int, top_k: int) -> Tensor:
    """How often each expert has each rank in its group: scores [R, N] -> float64 [G, k, M]."""
    experts = score.shape[1] // groups
    selected = select_top_k(score.unflatten(1, (groups, experts)), top_k)  # [R, G, k]
    return F.one_hot(selected, experts).double().mean(0)
