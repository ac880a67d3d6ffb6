"""Replaying routing that was recorded elsewhere, so that training sees the experts that served a text.

A serving engine's arithmetic differs from the trainer's in its last bits, and where two experts are nearly as probable
a bit decides which of them wakes. Who trains on what an engine generated can have it return the experts it woke (in
vLLM: `--enable-return-routed-experts`) and wake the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from query_experts.attention import GQEAttention
from query_experts.modeling_gqe import GQEForCausalLM


@contextmanager
def replayed_routing(model: GQEForCausalLM, experts: Tensor) -> Iterator[None]:
    """Within it, forward passes over B rows of T tokens, without a cache, wake these experts.

    experts: integers [B, T, L, G*k], L layers, expert m of group g as g*M + m; in each group the most probable first,
    as vLLM returns them. The router's probabilities, and so the weighted slot, its gradients and the balance loss, are
    the model's own. With activation checkpointing the backward pass belongs inside as well.

    Raises ValueError for experts that don't fit the model.
    """
    layers = [module for module in model.model.layers.modules() if isinstance(module, GQEAttention)]
    G, M, k = layers[0].num_kv_heads, layers[0].experts_per_group, layers[0].top_k
    if experts.ndim != 4 or experts.shape[2:] != (len(layers), G * k):
        raise ValueError(f"experts are {list(experts.shape)}; they must be [batch, tokens, {len(layers)}, {G * k}]")
    within_group = experts.long().unflatten(-1, (G, k)) - torch.arange(0, G * M, M, device=experts.device)[:, None]
    if ((within_group < 0) | (within_group >= M)).any():
        raise ValueError(f"experts name one outside its group; {k} of each group's {M} must stand in order of groups")
    for layer, indices in zip(layers, within_group.unbind(2), strict=True):
        layer.forced_indices = indices.to(layer.q_proj.weight.device)
    try:
        yield
    finally:
        for layer in layers:
            layer.forced_indices = None
