"""Taking the woken experts' rows out of all experts' rows, and putting them back.

Both work on whole rows of d numbers, which no two indices share: a copy for each row, forwards and backwards. The plain
way, `torch.gather` and `scatter` with an index for every number, gives the same and takes a CPU longer.

Shapes: B batch, T tokens, G groups, M experts in a group, k woken in a group, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_numbers(indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """Where the woken experts stand among the B*T*G*M rows of all experts: int64 [B*T*G*k]."""
    k = indices_BTGk.shape[-1]
    first = torch.arange(0, indices_BTGk.numel() // k * num_experts, num_experts, device=indices_BTGk.device)
    return (indices_BTGk.reshape(-1, k) + first[:, None]).flatten()


def select_experts(rows_BTGMd: Tensor, indices_BTGk: Tensor) -> Tensor:
    """[B, T, G, M, d] and int64 [B, T, G, k] -> the indexed rows, [B, T, G, k, d]."""
    B, T, G, M, d = rows_BTGMd.shape
    rows = rows_BTGMd.reshape(-1, d).index_select(0, row_numbers(indices_BTGk, M))
    return rows.view(B, T, G, -1, d)


def scatter_experts(rows_BTGkd: Tensor, indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """The reverse: rows [B, T, G, k, d] at their experts' places in zeros [B, T, G, M, d]."""
    B, T, G, _, d = rows_BTGkd.shape
    everywhere = rows_BTGkd.new_zeros(B * T * G * num_experts, d)
    rows = everywhere.index_copy(0, row_numbers(indices_BTGk, num_experts), rows_BTGkd.reshape(-1, d))
    return rows.view(B, T, G, num_experts, d)
