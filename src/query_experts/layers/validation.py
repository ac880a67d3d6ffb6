"""Checks which GQE layers can be built, and what a layer may be called with: by types, shapes and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from query_experts.layers.caches import cached_tokens

VARIANTS = ("gqe", "hard_concat", "weighted_concat")
OUTPUT_PROJECTIONS = ("slot", "expert")
ROUTINGS = ("learned", "frozen", "none")
SHARED_HEAD_KV = ("mean", "first")

# the layer's names -> those of Transformers, which configurations and settings have
CONFIG_NAMES = {
    "num_query_experts": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "active_query_experts",
}


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; a bool isn't."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and finite; a bool isn't."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def default_head_dim(hidden_size: int, num_query_experts: int, names: Mapping[str, str] | None = None) -> int:
    """D / N, for a layer without a head_dim. Raises ValueError where it is no whole number; names as in `check_layout`.

    Of counts that aren't whole positive numbers it is 1: `check_layout` refuses them.
    """
    if not all(is_whole(count) and count > 0 for count in (hidden_size, num_query_experts)):
        return 1
    if hidden_size % num_query_experts:
        name = (names or {}).get("num_query_experts", "num_query_experts")
        raise ValueError(
            f"hidden_size is {hidden_size}; without head_dim it must be a multiple of {name}, {num_query_experts}"
        )
    return hidden_size // num_query_experts


def check_layout(
    hidden_size: int,
    num_query_experts: int,
    num_kv_heads: int,
    top_k: int,
    head_dim: int,
    rope: bool,
    variant: str,
    output_projection: str,
    routing: str,
    shared_head_kv: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuses a layer that can't be built.

    Args:
        rope: Whether the layer has a rotary embedding.
        names: The layer's name of a field -> what the caller calls it, where they differ.

    Raises:
        ValueError: The sentence names the field, what it held and what is allowed.
    """
    for name, value, allowed in (
        ("variant", variant, VARIANTS),
        ("output_projection", output_projection, OUTPUT_PROJECTIONS),
        ("routing", routing, ROUTINGS),
        ("shared_head_kv", shared_head_kv, SHARED_HEAD_KV),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    check_heads(hidden_size, num_query_experts, num_kv_heads, top_k, head_dim, rope, names)
    experts_per_group = num_query_experts // num_kv_heads
    if routing == "none" and top_k != experts_per_group:
        raise ValueError(
            f"routing is 'none' and {(names or {}).get('top_k', 'top_k')} {top_k} of {experts_per_group} experts in a "
            "group; without a router it must be all of them"
        )


def check_heads(
    hidden_size: int,
    num_query_experts: int,
    num_kv_heads: int,
    top_k: int,
    head_dim: int,
    rope: bool,
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuses counts that don't fit together; arguments and errors as in `check_layout`."""
    counts = {
        "hidden_size": hidden_size,
        "num_query_experts": num_query_experts,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "top_k": top_k,
    }
    called = {name: (names or {}).get(name, name) for name in counts}
    for name, count in counts.items():
        if not is_whole(count):
            raise ValueError(f"{called[name]} is {count!r}; it must be a whole number")
    for name, count in counts.items():
        if count < 1 and name != "top_k":
            raise ValueError(f"{called[name]} is {count}; it must be 1 or more")
    if num_query_experts % num_kv_heads:
        raise ValueError(
            f"{called['num_query_experts']} is {num_query_experts}; it must be a multiple of "
            f"{called['num_kv_heads']}, {num_kv_heads}"
        )
    experts_per_group = num_query_experts // num_kv_heads
    if not 1 <= top_k <= experts_per_group:
        raise ValueError(f"{called['top_k']} is {top_k}; it must be 1 to {experts_per_group}, the experts in a group")
    if rope and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary position embedding needs an even number")


def check_numbers(rope_theta: float | None, dropout: float, norm_eps: float, layer_idx: int) -> None:
    """Refuses a layer's other numbers where it can't compute with them. Errors as in `check_layout`."""
    if rope_theta is not None and not (is_number(rope_theta) and rope_theta >= 1):
        raise ValueError(f"rope_theta is {rope_theta!r}; it must be a number, 1 or more, or None")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}; it must be a number, 0 or more and below 1")
    if not (is_number(norm_eps) and norm_eps >= 0):
        raise ValueError(f"norm_eps is {norm_eps!r}; it must be a number, 0 or more")
    if not (is_whole(layer_idx) and layer_idx >= 0):
        raise ValueError(f"layer_idx is {layer_idx!r}; it must be a whole number, 0 or more")


def check_switches(**switches: Any) -> None:
    """Refuses what isn't True or False: a text such as "false" would count as True. Errors as in `check_layout`."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be True or False")


def check_inputs(
    hidden_size: int | None,
    layer_idx: int,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Refuses what a layer can't be called with; arguments as in `GQEAttention.forward`, hidden_size None if unknown.

    Raises:
        ValueError: The sentence names the argument, its shape or type, and what is allowed.
    """
    _check_tensor("x", x, "[batch, tokens, hidden size]", 3)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a float dtype")
    if hidden_size is not None and x.shape[2] != hidden_size:
        raise ValueError(f"x has shape {list(x.shape)}; its last size must be hidden_size, {hidden_size}")
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise ValueError(
            f"past_key_values is of type {type(past_key_values).__name__}; it must be a Transformers Cache, or None"
        )
    batch, tokens = x.shape[:2]
    if position_ids is not None:
        _check_tensor("position_ids", position_ids, "[batch, tokens] or [1, tokens]", 2)
        if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
            raise ValueError(f"position_ids has dtype {position_ids.dtype}; it must be an integer dtype")
        if position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}; it must be {[batch, tokens]} or {[1, tokens]}"
            )
    if attention_mask is not None:
        past = (cached_tokens(past_key_values, layer_idx) or 0) if past_key_values is not None else 0
        _check_mask(attention_mask, batch, tokens, past, exact=past_key_values is None)


def _check_tensor(name: str, value: Any, form: str, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}; it must be a tensor {form}")
    if value.ndim != ndim:
        raise ValueError(f"{name} has {value.ndim} dimensions; it must be {form}")


def _check_mask(mask: Tensor, batch: int, tokens: int, past: int, exact: bool) -> None:
    """past: cached tokens, as far as they are known. exact: no more columns than keys."""
    _check_tensor("attention_mask", mask, "[batch, keys]", 2)
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"attention_mask has dtype {mask.dtype}; it must be bool or an integer dtype, nonzero for real tokens"
        )
    rows, columns = mask.shape
    if rows != batch:
        raise ValueError(
            f"attention_mask has shape {[rows, columns]}; it must have a row for each of the {batch} rows of x "
            "(it marks real tokens; causality holds in addition)"
        )
    keys = tokens + past
    if columns < keys or (exact and columns > keys):
        raise ValueError(
            f"attention_mask has {columns} columns; it must have one for each of the {keys} keys, cached and new"
        )
