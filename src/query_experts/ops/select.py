"""Selects the rows of the chosen experts from the rows of all experts, and puts them back.

Both work on whole rows of d numbers that no two indices of a group share. So either is the other's gradient, and each
row is copied once. `torch.gather` and `scatter` with one index per number give the same and take a CPU longer, but for
a few rows.

Shapes: B batch, T tokens, D hidden size, G groups, M experts in a group, k selected in a group, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

GATHERED_NUMBERS = 4096  # up to which a CPU gathers them faster than whole rows, by fewer calls (measured)
SPARSE_FROM = 8  # experts per selected one, from which reading only the selected rows of W_Q is faster (measured)


def selected_queries(q_proj: nn.Module, x: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Projects x [B, T, D] to the queries of the selected experts, [B, T, G, k, d].

    q_proj: a linear map D -> G*M*d. indices: int64 [B, T, G, k]. num_experts: M. Every query is projected and the
    selected ones are kept, except where `reads_selected_rows` holds.
    """
    if reads_selected_rows(q_proj, x, indices, num_experts):
        assert isinstance(q_proj, nn.Linear)
        return project_selected_rows(q_proj, x, indices, num_experts)
    query = q_proj(x).unflatten(-1, (indices.shape[2], num_experts, -1))  # [B, T, G, M, d]
    return select_experts(query, indices)


def reads_selected_rows(q_proj: nn.Module, x: Tensor, indices: Tensor, num_experts: int) -> bool:
    """Whether to read only the selected rows of W_Q: for one token in all on a CPU, where that was measured faster.

    The weights must be readable past their module: no hooks, adapters, offloading or gradients.
    """
    one_token = x.is_cpu and x.shape[0] * x.shape[1] == 1
    if not one_token or num_experts < SPARSE_FROM * indices.shape[-1] or torch.compiler.is_compiling():
        return False
    return is_plain_linear(q_proj, x.device)


def project_selected_rows(q_proj: nn.Linear, x: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """As `selected_queries` for x [1, 1, D], from the selected rows of a plain linear map's weight and bias."""
    G, k = indices.shape[2:]
    rows = row_numbers(indices, num_experts)  # [G*k]
    weight, bias = (
        t.view(G * num_experts, -1, *t.shape[1:]).index_select(0, rows).flatten(0, 1) if t is not None else None
        for t in (q_proj.weight, q_proj.bias)
    )  # [G*k*d, D], [G*k*d]
    return F.linear(x, weight, bias).view(1, 1, G, k, -1)


def is_plain_linear(module: nn.Module, device: torch.device) -> bool:
    """Whether calling the module is `F.linear` with its weight and bias, and autograd needs to see none of it."""
    if not is_unchanged_linear(module):
        return False
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not graded and all(type(t) is nn.Parameter and t.device == device for t in tensors)


def is_unchanged_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` that nothing hooks into or replaces."""
    return type(module) is nn.Linear and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: by hooks, global ones too, or a replacement."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or _has_any_global_hook() or "forward" in vars(module)


def row_numbers(indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """The positions of the selected experts among the B*T*G*M rows of all experts: int64 [B*T*G*k]."""
    k = indices_BTGk.shape[-1]
    groups = indices_BTGk.numel() // k  # of all tokens
    first = torch.arange(0, groups * num_experts, num_experts, device=indices_BTGk.device)
    return (indices_BTGk.reshape(groups, k) + first[:, None]).flatten()


def select_experts(rows_BTGMd: Tensor, indices_BTGk: Tensor) -> Tensor:
    """[B, T, G, M, d] and int64 [B, T, G, k] -> the indexed rows, [B, T, G, k, d]; no two of a group may be equal.

    Autograd would add gradients to zeros, which is right for a CPU; elsewhere they are written by comparison.
    """
    if torch.compiler.is_compiling():
        return SelectRows.apply(rows_BTGMd, indices_BTGk)
    if rows_BTGMd.is_cpu or not torch.is_grad_enabled():
        return read_rows(rows_BTGMd, indices_BTGk)
    return TransformableSelectRows.apply(rows_BTGMd, indices_BTGk)


def scatter_experts(rows_BTGkd: Tensor, indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """The reverse: rows [B, T, G, k, d] at their experts' places in zeros [B, T, G, M, d]."""
    if torch.compiler.is_compiling():
        return ScatterRows.apply(rows_BTGkd, indices_BTGk, num_experts)
    if rows_BTGkd.is_cpu or not torch.is_grad_enabled():
        return write_rows(rows_BTGkd, indices_BTGk, num_experts)
    return TransformableScatterRows.apply(rows_BTGkd, indices_BTGk, num_experts)


def read_rows(rows_BTGMd: Tensor, indices_BTGk: Tensor) -> Tensor:
    """As `select_experts`, by autograd."""
    B, T, G, M, d = rows_BTGMd.shape
    cpu = rows_BTGMd.is_cpu and not torch.compiler.is_compiling()
    if cpu and indices_BTGk.numel() * d <= GATHERED_NUMBERS:
        return rows_BTGMd.gather(3, indices_BTGk[..., None].expand(*indices_BTGk.shape, d))
    rows = rows_BTGMd.reshape(B * T * G * M, d).index_select(0, row_numbers(indices_BTGk, M))
    return rows.view(B, T, G, indices_BTGk.shape[3], d)


def write_rows(rows_BTGkd: Tensor, indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """As `scatter_experts`, by autograd. A CPU adds rows to zeros; elsewhere each place looks for its row."""
    if rows_BTGkd.is_cpu and not torch.compiler.is_compiling():
        return write_rows_by_addition(rows_BTGkd, indices_BTGk, num_experts)
    return write_rows_by_comparison(rows_BTGkd, indices_BTGk, num_experts)


def write_rows_by_addition(rows_BTGkd: Tensor, indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """On a CPU faster than `index_copy_` and much faster than a comparison (measured)."""
    B, T, G, k, d = rows_BTGkd.shape
    everywhere = rows_BTGkd.new_zeros(B * T * G * num_experts, d)
    everywhere.index_add_(0, row_numbers(indices_BTGk, num_experts), rows_BTGkd.reshape(B * T * G * k, d))
    return everywhere.view(B, T, G, num_experts, d)


def write_rows_by_comparison(rows_BTGkd: Tensor, indices_BTGk: Tensor, num_experts: int) -> Tensor:
    """Every number is written once, so a compiler fuses this with what follows, and nothing is accumulated."""
    experts = torch.arange(num_experts, device=indices_BTGk.device)[:, None]  # [M, 1]
    everywhere: Tensor | float = 0.0
    for row, index in zip(rows_BTGkd.unbind(3), indices_BTGk.unbind(3), strict=True):
        everywhere = torch.where(index[..., None, None] == experts, row[..., None, :], everywhere)
    assert isinstance(everywhere, Tensor)
    return everywhere


class SelectRows(torch.autograd.Function):
    """`read_rows`, whose gradient is `scatter_experts`, in the form that torch.compile takes: without `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, indices: Tensor) -> Tensor:
        return read_rows(rows, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        rows, indices = inputs
        ctx.num_experts = rows.shape[3]
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return scatter_experts(gradient, ctx.saved_tensors[0], ctx.num_experts), None


class ScatterRows(torch.autograd.Function):
    """`write_rows`, whose gradient is `select_experts`, in the form that torch.compile takes: without `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, indices: Tensor, num_experts: int) -> Tensor:
        return write_rows(rows, indices, num_experts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, indices, ctx.num_experts = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return select_experts(gradient, ctx.saved_tensors[0]), None, None


class TransformableSelectRows(SelectRows):
    @staticmethod
    def jvp(ctx: Any, rows_tangent: Tensor, _: None) -> Tensor:
        return select_experts(rows_tangent, ctx.saved_tensors[0])


class TransformableScatterRows(ScatterRows):
    @staticmethod
    def jvp(ctx: Any, rows_tangent: Tensor, *_: None) -> Tensor:
        return scatter_experts(rows_tangent, ctx.saved_tensors[0], ctx.num_experts)
