"""The router: selects k of each group's M query experts for every token.

Shapes: B batch, T tokens, D hidden size, G groups (= KV heads), M experts in a group, k selected experts in a group,
N = G*M query experts. Experts are numbered group-major: expert m of group g is g*M + m.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from query_experts.ops.dtypes import wide

CPU_ROWS = 512  # tokens whose float32 copy fits into a core's cache


class Router(nn.Module):
    """One linear map D -> M for each group, without bias (arXiv 2606.20945, section 3; router weights r_g).

    Logits are float32 whatever the model's dtype, because bf16 logits flip selections; float64 stays float64. Initial
    weights are small and random: a zero router ties every logit, and devices break ties differently. A router that
    isn't trainable holds its weight as a buffer, so no optimizer trains it. It is not an `nn.Linear`: tools that
    replace those by quantised or adapted modules leave it alone.

    Args:
        hidden_size: D.
        num_query_experts: N = G*M, rows of the weight [N, D], group-major.
        trainable: whether the weight is a parameter.
        device: of the weight, as in `nn.Linear`.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        num_query_experts: int,
        trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        weight = torch.empty(num_query_experts, hidden_size, device=device, dtype=dtype)
        self.weight: Tensor
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew, whether or not it trains."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D], any float dtype -> logits [B*T, N], float32 (float64 for float64 input)."""
        dtype = wide(x.dtype)
        rows, weight = x.flatten(0, 1), self.weight.to(dtype)
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            if x.dtype == dtype or torch.compiler.is_compiling():  # a compiler decides what to keep
                return F.linear(rows.to(dtype), weight)
            return (WideningLinear.apply if torch.is_grad_enabled() else WideningLinear.forward)(rows, weight)


class WideningLinear(torch.autograd.Function):
    """rows [R, D] of a narrow dtype, weight [N, D] of a wide one -> rows @ weight.T [R, N], wide.

    It keeps the narrow rows for the backward pass; a wide copy would be twice as large, in every layer. On a CPU it
    works on `CPU_ROWS` rows at a time, so that their wide copy stays in the cache.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        return joined([F.linear(block.to(weight.dtype), weight) for block in row_blocks(rows)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = joined([(block @ weight).to(rows.dtype) for block in row_blocks(gradient)])
        if ctx.needs_input_grad[1]:
            pairs = zip(row_blocks(gradient), row_blocks(rows), strict=True)
            grad_weight = reduce(torch.add, (grad.mT @ block.to(weight.dtype) for grad, block in pairs))
        return grad_rows, grad_weight

    @staticmethod
    def jvp(ctx: Any, rows_tangent: Tensor | None, weight_tangent: Tensor | None) -> Tensor:
        rows, weight = ctx.saved_tensors
        tangent = rows.new_zeros(rows.shape[0], weight.shape[0], dtype=weight.dtype)
        if rows_tangent is not None:
            tangent = tangent + rows_tangent.to(weight.dtype) @ weight.mT
        if weight_tangent is not None:
            tangent = tangent + rows.to(weight.dtype) @ weight_tangent.mT
        return tangent


def joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def row_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(CPU_ROWS) if rows.is_cpu else (rows,)


def select_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Indices of the k largest logits, largest first; ties go to the lowest index.

    logits [..., M] -> int64 [..., k]. Logits have the order of their probabilities, and keep it where the softmax
    underflows and ties. NaN counts as the largest. `torch.topk` guarantees no order among ties; argmax and a stable
    sort do.
    """
    if top_k == 1:
        return logits.argmax(-1, keepdim=True)
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :top_k]
