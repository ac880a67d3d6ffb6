"""Splits the columns of W_O over tensor-parallel ranks, by KV group.

Rank r of R owns G/R neighbouring groups. Columns of W_O are ordered by group, so the columns of a rank's hard slots (or
experts) are neighbours too. The two extra slots belong to no group:

- The weighted slot is a sum over the selected experts of all groups, and W_O is linear. So each rank applies the same
  columns to its own groups' part of the sum, and the all-reduce at the end of the layer adds the parts up.
- Every rank computes the shared head, but only rank 0 applies its columns. Elsewhere they are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from query_experts.model.configuration_gqe import GQEConfig


def output_projection_width(config: GQEConfig) -> int:
    """Columns of W_O: d for each hard slot (or expert), for the weighted slot and for the shared head."""
    by_expert = config.output_projection == "expert"
    hard = config.num_attention_heads if by_expert else config.num_key_value_heads * config.active_query_experts
    return (hard + (2 if config.variant == "gqe" else 0)) * config.head_dim


def shard_for_ranks(name: str, tensor: Tensor, config: GQEConfig, num_ranks: int) -> Tensor:
    """A tensor of o_proj in the checkpoint -> the tensor that vLLM splits evenly over the ranks.

    The weight is rearranged by `shard_output_weight`; a bias, and scales of whole output channels, stay as they are.
    Raises ValueError for weights that are packed or quantised in blocks, whose columns can't be separated.
    """
    if name.endswith(".weight") and tensor.shape[-1] == output_projection_width(config):
        return shard_output_weight(tensor, config.head_dim, num_ranks)
    if tensor.numel() in (1, config.hidden_size):
        return tensor
    raise ValueError(
        f"tensor_parallel_size is {num_ranks} and {name} {list(tensor.shape)}; o_proj goes to ranks by KV group, so "
        "its weight must be whole, and quantised by tensor or output channel, if at all"
    )


def shard_output_weight(weight: Tensor, head_dim: int, num_ranks: int) -> Tensor:
    """Rearrange W_O of the variant `gqe` so that the columns of each rank are neighbours, rank after rank.

    weight: [D, (hard + 2) * d], with a number of hard slots (or experts) that R divides -> [D, (hard + 2*R) * d]. With
    R = 1 it stays the same.
    """
    hard_slots, weighted, shared = weight.split([weight.shape[-1] - 2 * head_dim, head_dim, head_dim], -1)
    parts: list[Tensor] = []
    for rank, own in enumerate(hard_slots.chunk(num_ranks, -1)):
        parts += [own, weighted, shared if rank == 0 else torch.zeros_like(shared)]
    return torch.cat(parts, -1)
