"""Checks the parameters of the rotary embedding, which Transformers only warns of or computes NaN with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from query_experts.layers.masks import has_values
from query_experts.layers.validation import is_number

# rope_type -> the numbers above 0 that Transformers reads for it; it ignores others
READ_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
}
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow")
OPTIONAL_FACTOR = ("proportional", "yarn", "longrope")  # the types that do without a factor
FACTOR_LISTS = ("short_factor", "long_factor")  # of longrope
MSCALES = ("mscale", "mscale_all_dim")  # of yarn


def check_rope_parameters(config: PreTrainedConfig, head_dim: int) -> None:
    """Refuses rotary parameters that give an error or NaN; where a rope_type lacks one, Transformers refuses it.

    Args:
        config: its `rope_parameters` are in one dictionary for all layers.
        head_dim: d, of which `partial_rotary_factor` is rotated.

    Raises:
        ValueError: The sentence names the parameter, what it held and what is allowed.
    """
    rope = config.rope_parameters
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(
            f"rope_parameters hold a dictionary for {nested[0]!r}; they must be one dictionary for all layers"
        )
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"rope_type is {rope_type!r}; it must be default or one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    check_rope_values({"rope_theta": None} | rope)
    if rope_type == "longrope":
        share = rope.get("partial_rotary_factor")
        rotated = int(head_dim * (1.0 if share is None else share))
        for name in FACTOR_LISTS:
            if name in rope and len(rope[name]) != (rotated + 1) // 2:
                raise ValueError(
                    f"{name} has {len(rope[name])} numbers; it must have {(rotated + 1) // 2}, one for each two of the "
                    f"{rotated} rotated dimensions"
                )


def check_rope_values(rope: dict[str, Any]) -> None:
    """Refuses values that aren't numbers of the right kind, among those that the rope_type reads; raises as above.

    None stands for a value that is left out, where the rope_type can do without.
    """
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    theta = rope.get("rope_theta", 1.0)
    if not (is_number(theta) and theta >= 1):
        raise ValueError(f"rope_theta is {theta!r}; it must be a number, 1 or more")
    for name in READ_NUMBERS.get(rope_type, ()):
        optional = name in OPTIONAL or (name == "factor" and rope_type in OPTIONAL_FACTOR)
        if name not in rope or (rope[name] is None and optional):
            continue
        if not (is_number(rope[name]) and rope[name] > 0):
            raise ValueError(f"{name} is {rope[name]!r}; it must be a number above 0")
    share = rope.get("partial_rotary_factor")
    if share is not None and not (is_number(share) and 0 <= share <= 1):
        raise ValueError(f"partial_rotary_factor is {share!r}; it must be a number from 0 to 1")
    for name in MSCALES if rope_type == "yarn" else ():
        if rope.get(name) is not None and not is_number(rope[name]):
            raise ValueError(f"{name} is {rope[name]!r}; it must be a number, or None")
    for name in FACTOR_LISTS if rope_type == "longrope" else ():
        numbers = rope.get(name, [])
        if not isinstance(numbers, list | tuple) or not all(is_number(n) and n > 0 for n in numbers):
            raise ValueError(f"{name} is {numbers!r}; it must be a list of numbers above 0")


def without_none(rope: dict[str, Any]) -> dict[str, Any]:
    """Checked parameters without those that are None, which Transformers would compute with; yarn needs its factor."""
    yarn = rope.get("rope_type") == "yarn"
    return {name: value for name, value in rope.items() if value is not None or (yarn and name == "factor")}


def check_rope_frequencies(config: PreTrainedConfig) -> None:
    """Refuses checked parameters together, where Transformers' angles within the context would be an error or NaN.

    Raises:
        ValueError: The sentence has the parameters.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":  # a rope_theta of 1 or more is enough
        return
    compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    lengths = [None, rope["original_max_position_embeddings"] + 1] if rope["rope_type"] == "longrope" else [None]
    with torch.device("cpu"):  # whichever device the model is built on, meta too
        try:
            computed = [compute(config, seq_len=length) for length in lengths]
        except (ArithmeticError, ValueError, TypeError, RuntimeError):
            computed = []
    positions = config.max_position_embeddings
    if not computed or not all(_finite(frequencies * positions, factor) for frequencies, factor in computed):
        raise ValueError(
            f"rope_parameters are {rope}; with head_dim and max_position_embeddings {positions} they must give finite "
            "frequencies and an attention factor above 0"
        )


def _finite(angles: torch.Tensor, attention_factor: float) -> bool:
    return 0 < attention_factor < torch.inf and (not has_values(angles) or bool(angles.isfinite().all()))
