"""vLLM's rotary embedding for a GQE configuration; refuses parameters for which it would differ from Transformers'."""

from __future__ import annotations

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from vllm.model_executor.layers.rotary_embedding import get_rope

from query_experts.model.configuration_gqe import GQEConfig

# the parameters that Transformers' functions read, and two that rotary_embedding sets
KNOWN_PARAMETERS = {
    "type", "mscale", "mscale_all_dim", "truncate", "short_mscale", "long_mscale", *RopeParameters.__annotations__,
}  # fmt: skip
KNOWN_PARAMETERS -= {"mrope_section"}


def rotary_embedding(config: GQEConfig, max_position: int, max_model_len: int) -> nn.Module:
    """Build the module that rotates queries and keys [T, heads * d] at positions [T].

    vLLM looks angles up in a table. For a position beyond the table it would read other memory without an error.

    Args:
        config: the model's configuration.
        max_position: its max_position_embeddings.
        max_model_len: the longest sequence that vLLM serves.

    Raises:
        ValueError: for a `max_model_len` beyond the table, and for parameters that Transformers doesn't know, some of
            which vLLM would use.
    """
    parameters = dict(config.rope_parameters)
    if unknown := sorted(parameters.keys() - KNOWN_PARAMETERS):
        raise ValueError(
            f"rope_parameters hold {unknown[0]}; they must hold nothing but {', '.join(sorted(KNOWN_PARAMETERS))}"
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "linear":
        parameters["factor"] = float(parameters["factor"])  # vLLM treats an integer as a list
    elif rope_type == "longrope":  # vLLM ignores `factor` and `attention_factor`
        _, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
        parameters |= {"short_mscale": scaling, "long_mscale": scaling}
    rotary = get_rope(config.head_dim, max_position=max_position, rope_parameters=parameters)
    num_positions = max_position if rope_type == "longrope" else rotary.cos_sin_cache.shape[0]
    if max_model_len > num_positions:
        raise ValueError(
            f"max_model_len is {max_model_len}; with rope_type {rope_type!r} and these rope_parameters vLLM knows "
            f"{num_positions} positions, so it must be no more"
        )
    return rotary
