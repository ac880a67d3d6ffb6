"""Checks the parameters of the rotary embedding, which Transformers only warns of or computes NaN with."""

from __future__ import annotations

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from query_experts.layers.validation import is_number

ABOVE_ZERO = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ABOVE_ZERO_OR_NONE = ("attention_factor", "beta_fast", "beta_slow")
DERIVED_FACTOR = ("yarn", "longrope")  # where Transformers works out a factor that is None
FACTOR_LISTS = ("short_factor", "long_factor")  # of longrope


def check_rope_parameters(rope: dict[str, Any], head_dim: int) -> None:
    """Refuses rotary parameters that give an error or NaN; where a rope_type lacks one, Transformers refuses it.

    Args:
        rope: `rope_parameters` of a configuration, in one dictionary for all layers.
        head_dim: d, of which `partial_rotary_factor` is rotated.

    Raises:
        ValueError: The sentence names the parameter, what it held and what is allowed.
    """
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"rope_type is {rope_type!r}; it must be default or one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    check_rope_values({"rope_theta": None} | rope)
    if rope_type == "longrope":
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        for name in FACTOR_LISTS:
            if name in rope and len(rope[name]) != (rotated + 1) // 2:
                raise ValueError(
                    f"{name} has {len(rope[name])} numbers; it must have {(rotated + 1) // 2}, one for each two of the "
                    f"{rotated} rotated dimensions"
                )


def check_rope_values(rope: dict[str, Any]) -> None:
    """Refuses values that aren't numbers of the right kind, as far as there are any; raises as above."""
    derived = rope.get("rope_type", rope.get("type")) in DERIVED_FACTOR
    for name in (*ABOVE_ZERO, *ABOVE_ZERO_OR_NONE):
        optional = name in ABOVE_ZERO_OR_NONE or (name == "factor" and derived)
        if name not in rope or (rope[name] is None and optional):
            continue
        if not (is_number(rope[name]) and rope[name] > 0):
            raise ValueError(f"{name} is {rope[name]!r}; it must be a number above 0")
    share = rope.get("partial_rotary_factor", 1.0)
    if not (is_number(share) and 0 <= share <= 1):
        raise ValueError(f"partial_rotary_factor is {share!r}; it must be a number from 0 to 1")
    for name in FACTOR_LISTS:
        numbers = rope.get(name, [])
        if not isinstance(numbers, list | tuple) or not all(is_number(n) and n > 0 for n in numbers):
            raise ValueError(f"{name} is {numbers!r}; it must be a list of numbers above 0")
