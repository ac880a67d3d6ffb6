"""Owns where the time of the GQE layer goes: its stages timed one by one, with learned and with forced routing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from query_experts.bench.models import Layer
from query_experts.common.timing import time_interleaved
from query_experts.layers.attention import GQEAttention, Routing
from query_experts.ops.attend import attend
from query_experts.ops.rotate import rotate
from query_experts.ops.select import select_experts

ROUTING_STAGES = ("route", "select", "combine")


@torch.no_grad()
def time_parts(layer: Layer, length: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each stage over a prompt of batch 1, of the whole layer, and of the layer routed uniformly."""
    module = layer.module
    assert isinstance(module, GQEAttention)
    x = layer.hidden(1, length)
    arguments = layer.prepare(x, 0, None)
    cos_sin, mask = arguments["position_embeddings"], arguments["attention_mask"]
    routing = module.route(x)
    query, shared_query = project_all(module, x)
    key, value = module.project_keys_values(x)
    selected = select(query, shared_query, routing)
    rotated, rotated_key = rotate(selected, key, cos_sin)
    routed, shared, _ = attend(module, rotated, rotated_key, value, mask, None)
    slots = module.combine(routed, shared, routing)
    uniform = uniform_routing(routing)

    def layer_with(fixed: Routing) -> Callable[[], Tensor]:
        def call() -> Tensor:
            k, v = module.project_keys_values(x)
            rotated_q, rotated_k = rotate(module.project_queries(x, fixed), k, cos_sin)
            ours, shared, _ = attend(module, rotated_q, rotated_k, v, mask, None)
            return module.o_proj(module.combine(ours, shared, fixed))

        return call

    calls: dict[str, Callable[[], object]] = {
        "layer": lambda: layer.forward(x, **arguments),
        "layer, routing given": layer_with(routing),
        "layer, routing given and uniform": layer_with(uniform),
        "route": lambda: module.route(x),
        "project": lambda: (project_all(module, x), module.project_keys_values(x)),
        "select": lambda: select(query, shared_query, routing),
        "rotate": lambda: rotate(selected, key, cos_sin),
        "attend": lambda: attend(module, rotated, rotated_key, value, mask, None),
        "combine": lambda: module.combine(routed, shared, routing),
        "output projection": lambda: module.o_proj(slots),
    }
    return {name: [round(s, 7) for s in times] for name, times in time_interleaved(calls, repeats, device).items()}


def project_all(module: GQEAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, D] -> queries of all experts [B, T, G, M, d], and of the shared head [B, T, 1, d]."""
    assert module.q_shared is not None
    query = module.q_proj(x).view(*x.shape[:2], module.num_kv_heads, module.experts_per_group, module.head_dim)
    return query, module.q_shared(x).unsqueeze(2)


def select(query: Tensor, shared_query: Tensor, routing: Routing) -> Tensor:
    """As `GQEAttention.project_queries` goes on: [B, G*k + 1, T, d]."""
    return torch.cat([select_experts(query, routing.indices).flatten(2, 3), shared_query], 2).transpose(1, 2)


def uniform_routing(routing: Routing) -> Routing:
    """Token t wakes experts t, t + 1, ... of each group, round and round."""
    B, T, G, M = routing.probs.shape
    k = routing.indices.shape[-1]
    turn = torch.arange(T, device=routing.probs.device)[:, None, None] + torch.arange(k, device=routing.probs.device)
    return Routing(routing.logits, torch.full_like(routing.probs, 1 / M), (turn % M).expand(B, T, G, k).contiguous())
