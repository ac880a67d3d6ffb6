"""Which layers can be built: the choices that a GQE layer has, and the counts that fit together."""

from __future__ import annotations

from numbers import Integral

VARIANTS = ("gqe", "hard_concat", "weighted_concat")
OUTPUT_PROJECTIONS = ("slot", "expert")
ROUTINGS = ("learned", "frozen", "none")
SHARED_HEAD_KV = ("mean", "first")


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
) -> None:
    """Raises ValueError, naming the field, what it held and what is allowed, for a layer that can't be built."""
    for name, held, allowed in (
        ("variant", variant, VARIANTS),
        ("output_projection", output_projection, OUTPUT_PROJECTIONS),
        ("routing", routing, ROUTINGS),
        ("shared_head_kv", shared_head_kv, SHARED_HEAD_KV),
    ):
        if held not in allowed:
            raise ValueError(f"{name} is {held!r}; it must be one of {', '.join(allowed)}")
    counts = {
        "hidden_size": hidden_size,
        "num_query_experts (num_attention_heads)": num_query_experts,
        "num_kv_heads (num_key_value_heads)": num_kv_heads,
        "head_dim": head_dim,
    }
    for name, count in [*counts.items(), ("top_k (active_query_experts)", top_k)]:
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise ValueError(f"{name} is {count!r}; it must be a whole number")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be 1 or more")
    if num_query_experts % num_kv_heads:
        raise ValueError(
            f"num_query_experts (num_attention_heads) is {num_query_experts}; it must be a multiple of "
            f"num_kv_heads (num_key_value_heads), {num_kv_heads}"
        )
    experts_per_group = num_query_experts // num_kv_heads
    if not 1 <= top_k <= experts_per_group:
        raise ValueError(
            f"top_k (active_query_experts) is {top_k}; it must be 1 to {experts_per_group}, the experts in a group"
        )
    if routing == "none" and top_k != experts_per_group:
        raise ValueError(
            f"routing is 'none' and top_k (active_query_experts) {top_k} of {experts_per_group} experts in a group; "
            f"without a router it must be all of them"
        )
    if rope and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary position embedding needs an even number")
