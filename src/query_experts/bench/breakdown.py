"""Times the stages of the GQE layer one by one, and the whole layer with learned, given and uniform routing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from query_experts.bench.models import AttentionInputs, Layer
from query_experts.bench.results import LAYER
from query_experts.common.timing import Call, time_interleaved
from query_experts.layers.attention import GQEAttention, Routing
from query_experts.ops.attend import attend
from query_experts.ops.rotate import rotate
from query_experts.ops.select import select_experts


@torch.no_grad()
def time_parts(layer: Layer, length: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Times each stage over a prompt of batch 1, and the whole layer by its three kinds of routing; by kernels torch.

    Returns:
        Seconds of one call, a list of `repeats` for each stage.
    """
    module = layer.module
    assert isinstance(module, GQEAttention)
    module.set_kernels("torch")  # whose stages are functions that can be called one by one
    x = layer.hidden(1, length)
    inputs = layer.inputs(x, 0, None)
    routing = module.route(x)
    uniform = uniform_routing(routing)
    calls: dict[str, Call] = {
        LAYER: lambda: layer.forward(x, inputs),
        "layer, routing given": lambda: _forward_with(module, x, inputs, routing),
        "layer, routing given and uniform": lambda: _forward_with(module, x, inputs, uniform),
        **_stage_calls(module, x, inputs, routing),
    }
    return time_interleaved(calls, repeats, device)


def _stage_calls(module: GQEAttention, x: Tensor, inputs: AttentionInputs, routing: Routing) -> dict[str, Call]:
    """A call of each stage, given the outputs of the stages before it."""
    cos_sin, mask = inputs.cos_sin, inputs.mask
    query, shared_query = _project_all(module, x)
    key, value = module.project_keys_values(x)
    heads = _select(query, shared_query, key, routing)
    rotated, rotated_key = module.queries_and_keys(rotate(heads, cos_sin))
    value = value.transpose(1, 2)
    routed, shared, _ = attend(module, rotated, rotated_key, value, mask, None)
    slots = module.combine(routed, shared, routing)
    return {
        "route": lambda: module.route(x),
        "project": lambda: (_project_all(module, x), module.project_keys_values(x)),
        "select": lambda: _select(query, shared_query, key, routing),
        "rotate": lambda: rotate(heads, cos_sin),
        "attend": lambda: attend(module, rotated, rotated_key, value, mask, None),
        "combine": lambda: module.combine(routed, shared, routing),
        "output projection": lambda: module.o_proj(slots),
    }


def _project_all(module: GQEAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, D] -> queries of all experts [B, T, G, M, d], and of the shared head [B, T, 1, d]."""
    assert module.q_shared is not None
    query = module.q_proj(x).view(*x.shape[:2], module.num_kv_heads, module.experts_per_group, module.head_dim)
    return query, module.q_shared(x).unsqueeze(2)


def _select(query: Tensor, shared_query: Tensor, key: Tensor, routing: Routing) -> Tensor:
    """The queries of the selected experts and of the shared head, and the keys, [B, T, G*k + 1 + G, d]."""
    return torch.cat([select_experts(query, routing.indices).flatten(2, 3), shared_query, key], 2)


def _forward_with(module: GQEAttention, x: Tensor, inputs: AttentionInputs, routing: Routing) -> Tensor:
    """The layer with a given routing, without its router."""
    heads, value = module.project(x, routing, None)
    query, key = module.queries_and_keys(rotate(heads, inputs.cos_sin))
    routed, shared, _ = attend(module, query, key, value.transpose(1, 2), inputs.mask, None)
    return module.o_proj(module.combine(routed, shared, routing))


def uniform_routing(routing: Routing) -> Routing:
    """Routing of the same shape in which token t selects experts t, t + 1, ... of each group, modulo M."""
    T, k = routing.indices.shape[1], routing.indices.shape[-1]
    device = routing.indices.device
    turn = torch.arange(T, device=device)[:, None, None] + torch.arange(k, device=device)
    return replace(routing, indices=(turn % routing.num_experts).expand_as(routing.indices).contiguous())
