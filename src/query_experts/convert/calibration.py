"""Where the router starts: fitted to what each head of the dense model does on some text.

Shapes: R rows (tokens), D hidden size, N query heads in G groups of M, k woken in a group, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from query_experts.layers.router import select_top_k

HELD_OUT = 5  # every fifth sequence judges the fit
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # over the features' mean sum of squares, all rows together
ROWS = 4096  # that are worked on at once


@dataclass(frozen=True)
class Fit:
    """A router and how good it is on tokens that it wasn't fitted to, but that its ridge was chosen by.

    Shares are of the heads' squared contributions to the layer's output: `kept` by the experts that the router wakes,
    `best` by the strongest of each token, `fixed` by the k of each group that are strongest on average.
    """

    weight: Tensor  # [N, D], float32
    kept: float
    best: float
    fixed: float


def contributions(heads: Tensor, o_proj: Tensor) -> Tensor:
    """How much each head adds to the layer's output: the norm of its output times its columns of W_O.

    heads: the heads' outputs [R, N, d]; o_proj [D, N*d]. -> float32 [R, N]
    """
    blocks = o_proj.float().unflatten(1, (heads.shape[1], -1)).transpose(0, 1)  # [N, D, d]
    gram = blocks.mT @ blocks  # [N, d, d]: the norm needs no vector of D numbers
    squares = []
    for part in heads.split(ROWS):
        rows = part.float().transpose(0, 1)  # [N, R, d]
        squares.append(((rows @ gram) * rows).sum(-1).T)
    return torch.cat(squares).clamp(min=0).sqrt()


def fit_router(x: Tensor, strength: Tensor, groups: int, top_k: int, held_out: Tensor) -> Fit:
    """The linear map whose softmax is nearest to the heads' shares of their group's strength, in ridge regression.

    x: the layer's normed input [R, D]; strength: of each head for each token [R, N], e.g. its contribution; held_out:
    which rows judge, bool [R]. The regression's target is log strength less its group's mean, so that the router's
    probabilities are proportional to strength. Of several ridges the one that keeps most on the held-out rows is taken.
    """
    strength = strength.float()
    target = strength.clamp(min=1e-6).log().unflatten(1, (groups, -1))
    target = (target - target.mean(-1, keepdim=True)).flatten(1)  # [R, N]
    gram, moment = (x.new_zeros(x.shape[1], n, dtype=torch.float64) for n in (x.shape[1], target.shape[1]))
    for rows, wanted in zip(x[~held_out].split(ROWS), target[~held_out].split(ROWS), strict=True):
        seen = rows.double()
        gram += seen.T @ seen
        moment += seen.T @ wanted.double()
    scale = gram.diagonal().mean()
    judged, given = strength[held_out], x[held_out].float()
    fits = []
    for ridge in RIDGES:
        weight = torch.linalg.solve(gram + ridge * scale * torch.eye(len(gram), device=x.device), moment).T.float()
        fits.append((kept_share(judged, F.linear(given, weight), groups, top_k), weight))
    kept, weight = max(fits, key=lambda fit: fit[0])
    always = strength[~held_out].square().mean(0)
    return Fit(
        weight,
        kept,
        kept_share(judged, judged, groups, top_k),
        kept_share(judged, always.expand_as(judged), groups, top_k),
    )


def kept_share(strength: Tensor, score: Tensor, groups: int, top_k: int) -> float:
    """The share of squared strength [R, N] that the k experts of the highest score [R, N] in each group have."""
    squares = strength.double().square().unflatten(1, (groups, -1))
    woken = select_top_k(score.unflatten(1, (groups, -1)), top_k)
    return float(squares.gather(-1, woken).sum() / squares.sum().clamp(min=1e-30))


def importance(strength: Tensor) -> Tensor:
    """Mean squared strength of each head, [R, N] -> [N]."""
    return strength.double().square().mean(0)


def rank_shares(score: Tensor, groups: int, top_k: int) -> Tensor:
    """How often each expert comes at each rank, score [R, N] -> [G, k, M]."""
    experts = score.shape[1] // groups
    woken = select_top_k(score.unflatten(1, (groups, experts)), top_k)  # [R, G, k]
    return F.one_hot(woken, experts).double().mean(0)
