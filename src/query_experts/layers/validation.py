"""Checks which GQE layers can be built: the choices that a layer has, and the counts that fit together."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

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


def default_head_dim(hidden_size: int, num_query_experts: int, names: Mapping[str, str] | None = None) -> int:
    """D / N, for a layer without a head_dim. Raises ValueError where it is no whole number; names as in `check_layout`.

    Of counts that aren't whole positive numbers it is 1: `check_layout` refuses them.
    """
    if not all(isinstance(count, Integral) and count > 0 for count in (hidden_size, num_query_experts)):
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
        if not isinstance(count, Integral) or isinstance(count, bool):
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
