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

from query_experts.model.configuration_gqe import GQEConfig


def output_rows(config: GQEConfig) -> int:
    """How many numbers W_O takes: hard slots (or experts), the weighted slot, the shared head."""
    by_expert = config.output_projection == "expert"
    hard = config.num_attention_heads if by_expert else config.num_key_value_heads * config.active_query_experts
    return (hard + (2 if config.variant == "gqe" else 0)) * config.head_dim


def shard_for_ranks(name: str, tensor: Tensor, config: GQEConfig, num_ranks: int) -> Tensor:
    """A tensor of o_proj in the checkpoint: its weight dealt out; its bias and scales of a whole row as they are.

    Raises ValueError for weights quantised in blocks or packed, whose rows can't be told apart.
    """
    if name.endswith(".weight") and tensor.shape[-1] == output_rows(config):
        return deal_output_rows(tensor, config.head_dim, num_ranks)
    if tensor.numel() in (1, config.hidden_size):
        return tensor
    raise ValueError(
        f"tensor_parallel_size is {num_ranks} and {name} {list(tensor.shape)}; o_proj goes to ranks by KV group, so "
        "its weight must be whole, and quantised by tensor or output channel, if at all"
    )


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
