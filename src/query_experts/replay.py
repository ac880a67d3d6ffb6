"""Replays recorded routing, so that training uses the experts that generated a text.

A serving engine's arithmetic differs from the trainer's in its last bits. If two experts are nearly equally probable,
such a bit decides which of them is selected. An engine can return the experts that it selected for a text (vLLM:
`--enable-return-routed-experts`), and training on that text can select the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from query_experts.layers.attention import GQEAttention
from query_experts.model.modeling_gqe import GQEModel


@contextmanager
def replayed_routing(model: nn.Module, experts: Tensor) -> Iterator[None]:
    """Context manager in which forward passes over B rows of T tokens, without a cache, select the given experts.

    The router's probabilities stay the model's own, and so do the weighted slot, its gradients and the balance loss.
    With activation checkpointing the backward pass must be inside the context too.

    Args:
        model: a GQE model, or a module that wraps one (adapters, DDP).
        experts: integers [B, T, L, G*k] for L layers; expert m of group g is g*M + m. Groups are in order, and within
            a group the most probable expert comes first, as vLLM returns them.

    Raises:
        ValueError: for experts that don't fit the model, for a model without routers, and for a replay within a
            replay; in a forward pass, for another number of rows or tokens.
    """
    decoders = [module for module in model.modules() if isinstance(module, GQEModel)]
    if len(decoders) != 1:
        raise ValueError(f"model is a {type(model).__name__} that holds {len(decoders)} GQE models; it must hold one")
    layers = [module for module in decoders[0].layers.modules() if isinstance(module, GQEAttention)]
    if layers[0].router is None:
        raise ValueError("routing is 'none'; without a router there is nothing to replay")
    if layers[0].forced_indices is not None:
        raise ValueError("model replays experts already; one replay must end before the next begins")
    within_group = experts_within_groups(experts, layers)
    for layer, indices in zip(layers, within_group.unbind(2), strict=True):
        layer.forced_indices = indices.to(layer.q_proj.weight.device)

    def check_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layers[0].forced_indices is None:  # a compiled model still calls removed hooks
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None and tokens.shape[:2] != experts.shape[:2]:
            raise ValueError(
                f"experts are for {list(experts.shape[:2])} tokens (batch, tokens), and these are "
                f"{list(tokens.shape[:2])}; both must be the same"
            )

    hook = decoders[0].register_forward_pre_hook(check_tokens, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.forced_indices = None


def experts_within_groups(experts: Tensor, layers: list[GQEAttention]) -> Tensor:
    """The experts numbered within their groups, 0 to M - 1: [B, T, L, G*k] -> int64 [B, T, L, G, k].

    Raises ValueError for experts that don't fit the layers.
    """
    M, k = layers[0].experts_per_group, layers[0].top_k
    assert layers[0].router is not None
    G = layers[0].router.weight.shape[0] // M  # of all ranks
    if not isinstance(experts, Tensor) or experts.dtype == torch.bool or experts.is_floating_point():
        kind = experts.dtype if isinstance(experts, Tensor) else type(experts).__name__
        raise ValueError(f"experts are {kind}; they must be a tensor of integers")
    if experts.ndim != 4 or experts.shape[2:] != (len(layers), G * k):
        raise ValueError(f"experts are {list(experts.shape)}; they must be [batch, tokens, {len(layers)}, {G * k}]")
    within_group = experts.long().unflatten(-1, (G, k)) - torch.arange(0, G * M, M, device=experts.device)[:, None]
    if ((within_group < 0) | (within_group >= M)).any():
        raise ValueError(f"experts name one outside its group; {k} of each group's {M} must stand in order of groups")
    in_order = within_group.sort(-1).values
    if (in_order[..., 1:] == in_order[..., :-1]).any():
        raise ValueError(f"experts name one twice; the {k} of a group must differ")
    return within_group
