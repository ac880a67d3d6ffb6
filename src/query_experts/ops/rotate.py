"""Rotary embedding of queries and keys in Llama's half-rotation form, of the whole head dim or of its first part.

Shapes: B batch, T tokens, d head dim, r rotated numbers of a head (d, or fewer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, [B, T, d], for position_ids [B, T]; angles are float32 whatever the dtype, as in Llama."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponents)  # [B, T, d/2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads_BThd: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotates heads, [B, T, heads, d], by cos and sin [B or 1, T, r]; None leaves them as they are.

    cos and sin of fewer than d numbers rotate only that many (partial rotary embedding, as in Phi-4-mini).
    """
    if cos_sin is None:
        return heads_BThd
    cos, sin = (t.unsqueeze(2) for t in cos_sin)
    trained = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if torch.compiler.is_compiling() or trained or heads_BThd.dtype != cos.dtype:
        return _by_formula(heads_BThd, cos, sin)
    if torch.is_grad_enabled() and heads_BThd.requires_grad:
        return Rotation.apply(heads_BThd, cos, sin)
    return _by_halves(heads_BThd, cos, sin)


def _by_formula(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Llama writes it. A compiler makes one pass of it."""
    turned = heads[..., : cos.shape[-1]]
    turned = turned * cos + rotate_half(turned) * sin
    return turned if cos.shape[-1] == heads.shape[-1] else torch.cat([turned, heads[..., cos.shape[-1] :]], -1)


def _by_halves(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """In fewer passes than the formula, or back by the transposed map. float32 and float64 get the formula's bits.

    In 16 bits each product is added before it is rounded, so a result is more exact than the formula's.
    """
    r = cos.shape[-1]
    if r == heads.shape[-1]:
        turned = heads * cos
    else:
        turned = heads.clone()
        turned[..., :r].mul_(cos)
    half = r // 2
    (first, second), (to_first, to_second) = (
        (t.narrow(-1, 0, half), t.narrow(-1, half, half)) for t in (heads, turned)
    )
    first_sin, second_sin = sin.chunk(2, -1)
    if back:
        _add_product(to_first, second, second_sin, 1)
        _add_product(to_second, first, first_sin, -1)
    else:
        _add_product(to_first, second, first_sin, -1)
        _add_product(to_second, first, second_sin, 1)
    return turned


def _add_product(total: Tensor, one: Tensor, other: Tensor, sign: int) -> None:
    """total += sign * one * other. In wide dtypes `addcmul_` may round once, where the formula rounds twice."""
    if total.dtype.itemsize == 2:
        total.addcmul_(one, other, value=sign)
    else:
        total.add_(one * other, alpha=sign)


class Rotation(torch.autograd.Function):
    """The rotation, whose gradient is one rotation back; autograd would take each of its steps back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _by_halves(heads, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _by_halves(gradient, cos, sin, back=True), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        cos, sin = ctx.saved_tensors
        return _by_halves(tangent, cos, sin)
