"""Owns where the time of the GQE layer goes: its stages timed one by one, with learned and with forced routing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from query_experts.bench.models import Layer
from query_experts.common.timing import time_interleaved
from query_experts.layers.attention import GQEAttention, Routing

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
    query, shared_query, key, value = module.project(x)
    selected = module.select(query, shared_query, routing)
    rotated, rotated_key = module.rotate(selected, key, cos_sin)
    routed, shared, _ = module.attend(rotated, rotated_key, value, mask, None)
    slots = module.combine(routed, shared, routing)
    uniform = uniform_routing(routing)

    def layer_with(fixed: Routing) -> Callable[[], Tensor]:
        def call() -> Tensor:
            q, s, k, v = module.project(x)
            rotated_q, rotated_k = module.rotate(module.select(q, s, fixed), k, cos_sin)
            ours, shared, _ = module.attend(rotated_q, rotated_k, v, mask, None)
            return module.o_proj(module.combine(ours, shared, fixed))

        return call

    calls: dict[str, Callable[[], object]] = {
        "layer": lambda: layer.forward(x, **arguments),
        "layer, routing given": layer_with(routing),
        "layer, routing given and uniform": layer_with(uniform),
        "route": lambda: module.route(x),
        "project": lambda: module.project(x),
        "select": lambda: module.select(query, shared_query, routing),
        "rotate": lambda: module.rotate(selected, key, cos_sin),
        "attend": lambda: module.attend(rotated, rotated_key, value, mask, None),
        "combine": lambda: module.combine(routed, shared, routing),
        "output projection": lambda: module.o_proj(slots),
    }
    return {name: [round(s, 7) for s in times] for name, times in time_interleaved(calls, repeats, device).items()}


def uniform_routing(routing: Routing) -> Routing:
    """Token t wakes experts t, t + 1, ... of each group, round and round."""
    B, T, G, M = routing.probs.shape
    k = routing.indices.shape[-1]
    turn = torch.arange(T, device=routing.probs.device)[:, None, None] + torch.arange(k, device=routing.probs.device)
    return Routing(routing.logits, torch.full_like(routing.probs, 1 / M), (turn % M).expand(B, T, G, k).contiguous())
