"""How the input rows of W_O are dealt out to tensor-parallel ranks: by KV group.

Rank r of R owns G/R neighbouring groups, whose hard slots (or experts) are neighbours in W_O as well, since its rows
are ordered by group. The two extra slots belong to no group:

- the weighted slot is a sum over all groups' woken experts, and W_O is linear, so each rank applies the same rows to
  its own groups' part of the sum, and the all-reduce that ends the layer adds the parts up;
- the shared head is computed on every rank, and its rows are applied on rank 0 alone: elsewhere they are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def deal_output_rows(weight: Tensor, head_dim: int, num_ranks: int) -> Tensor:
    """W_O of the variant `gqe` as R ranks hold it, one after the other.

    weight: [D, (hard + 2) * d], where `hard`, the rows' slots or experts, is a multiple of R
    -> [D, (hard + 2*R) * d]; with R = 1, the same.
    """
    hard_slots, weighted, shared = weight.split([weight.shape[-1] - 2 * head_dim, head_dim, head_dim], -1)
    pieces: list[Tensor] = []
    for rank, own in enumerate(hard_slots.chunk(num_ranks, -1)):
        pieces += [own, weighted, shared if rank == 0 else torch.zeros_like(shared)]
    return torch.cat(pieces, -1)
