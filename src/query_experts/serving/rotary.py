"""vLLM's rotary embedding for a GQE configuration, where it differs from Transformers' brought to agree or refused."""

from __future__ import annotations

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from vllm.model_executor.layers.rotary_embedding import get_rope

from query_experts.model.configuration_gqe import GQEConfig

# what Transformers' functions read, and two that are set below
KNOWN = {"type", "mscale", "mscale_all_dim", "truncate", "short_mscale", "long_mscale", *RopeParameters.__annotations__}
KNOWN -= {"mrope_section"}


def rotary_embedding(config: GQEConfig, max_position: int, max_model_len: int) -> nn.Module:
    """For positions [T], queries and keys [T, heads * d]: both as they are rotated.

    vLLM looks angles up in a table. Where positions go beyond it, it would read what lies behind, without an error.

    Raises ValueError for a max_model_len beyond the table, and for parameters that Transformers doesn't know: some of
    them vLLM obeys.
    """
    parameters = dict(config.rope_parameters)
    if unknown := sorted(parameters.keys() - KNOWN):
        raise ValueError(f"rope_parameters hold {unknown[0]}; they must hold nothing but {', '.join(sorted(KNOWN))}")
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        parameters["factor"] = float(parameters["factor"])  # vLLM takes a whole number for a list
    elif kind == "longrope":  # of which vLLM passes over `factor` and `attention_factor`
        _, scaling = ROPE_INIT_FUNCTIONS[kind](config)
        parameters |= {"short_mscale": scaling, "long_mscale": scaling}
    rotary = get_rope(config.head_dim, max_position=max_position, rope_parameters=parameters)
    reach = max_position if kind == "longrope" else rotary.cos_sin_cache.shape[0]
    if max_model_len > reach:
        raise ValueError(
            f"max_model_len is {max_model_len}; with rope_type {kind!r} and these rope_parameters vLLM knows {reach} "
            "positions, so it must be no more"
        )
    return rotary
