"""Rotary embedding of queries and keys in Llama's half-rotation form, of the whole head dim or of its first part.

Shapes: B batch, T tokens, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

FEW_TOKENS = 8  # up to this many, one rotation of queries and keys together is faster: half the calls


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, [B, T, d], for position_ids [B, T]; angles are float32 whatever the dtype, as in Llama."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponents)  # [B, T, d/2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(query: Tensor, key: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys, [B, heads, T, d], by cos and sin [B or 1, T, d]; None leaves them as they are.

    cos and sin of fewer than d numbers rotate only that many (partial rotary embedding, as in Phi-4-mini).
    """
    if cos_sin is None:
        return query, key
    if cos_sin[0].shape[-1] < query.shape[-1]:
        return apply_partial_rotary_pos_emb(query, key, *cos_sin)
    if torch.compiler.is_compiling() or query.shape[2] > FEW_TOKENS:
        return apply_rotary_pos_emb(query, key, *cos_sin)
    return _rotate_together(query, key, *cos_sin)


def _rotate_together(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    heads = torch.cat([query, key], 1)
    rotated = heads * cos.unsqueeze(1) + rotate_half(heads) * sin.unsqueeze(1)
    return rotated.split([query.shape[1], key.shape[1]], 1)
