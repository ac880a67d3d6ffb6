"""From a dense model's configuration to GQE's, and what can't be converted, each with its reason."""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from query_experts.common.errors import SettingError
from query_experts.convert.weight_map import LAYER
from query_experts.model.configuration_gqe import GQEConfig

CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "dtype",
)  # fmt: skip

# field that tells -> why such a model has no GQE form
FOREIGN = {
    "kv_lora_rank": "has multi-head latent attention, where no KV heads group the query heads",
    "no_rope_layers": "has layers without rotary embedding",
    "num_local_experts": "has a mixture of experts in place of the MLP",
    "num_experts": "has a mixture of experts in place of the MLP",
    "attn_logit_softcapping": "caps its attention's logits",
}
SINKS = ("gpt_oss",)


def gqe_config(dense: PreTrainedConfig, top_k: int | None, output_projection: str, variant: str) -> GQEConfig:
    """GQE's configuration of a dense model's shape; top_k None: all experts.

    Raises SettingError for a dense model that can't be converted, and for settings that it can't be converted to.
    """
    check_convertible(dense)
    experts = dense.num_attention_heads // dense.num_key_value_heads
    if top_k is not None and not 1 <= top_k <= experts:
        raise SettingError(f"top_k is {top_k}; it must be 1 to {experts}, the query heads that share a KV head")
    if output_projection not in ("expert", "slot"):
        raise SettingError(f"output_projection is {output_projection!r}; it must be expert or slot")
    if variant not in ("gqe", "hard_concat"):
        raise SettingError(f"variant is {variant!r}; it must be gqe or hard_concat, which can start equal to dense")
    qwen2 = dense.model_type == "qwen2"
    carried = {name: getattr(dense, name) for name in CARRIED}
    return GQEConfig(
        **carried | {"rope_parameters": rotary(dense)},
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        attention_bias=qwen2 or getattr(dense, "attention_bias", False),
        attention_output_bias=False if qwen2 else None,
        mlp_bias=getattr(dense, "mlp_bias", False),
        qk_norm=dense.model_type == "qwen3",
        active_query_experts=experts if top_k is None else top_k,
        output_projection=output_projection,
        variant=variant,
    )


def untied(config: PreTrainedConfig) -> PreTrainedConfig:
    """For weights whose output embedding isn't the input's, whatever the configuration says; so loads Transformers."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def rotary(dense: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding as the dense model itself computes it; of these families Phi-3 alone rotates a part.

    Raises SettingError for a part with scaled frequencies.
    """
    held = dict(dense.rope_parameters)
    part = held.get("partial_rotary_factor", 1.0)
    if dense.model_type != "phi3" and part != 1.0:
        kind = held.get("rope_type", "default")
        if kind == "proportional":  # of which the factor is part, in every family
            return held
        if kind != "default":
            raise SettingError(
                f"rope_parameters hold rope_type {kind!r} and partial_rotary_factor {part}; scaled "
                f"frequencies of a part are converted of phi3 alone, so partial_rotary_factor must be 1 for "
                f"{dense.model_type}"
            )
        del held["partial_rotary_factor"]  # passed over by the dense model
    return held


def check_convertible(dense: PreTrainedConfig) -> None:
    """Raises SettingError, with the reason, for a model whose attention has no GQE form."""
    kind = dense.model_type
    if kind not in LAYER:
        reasons = ["has attention sinks"] if kind in SINKS else []
        reasons += [why for field, why in FOREIGN.items() if getattr(dense, field, None) is not None]
        why = f", which {reasons[0]}" if reasons else ""
        raise SettingError(f"model_type is {kind!r}{why}; it must be one of {', '.join(sorted(LAYER))}")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
                 "head_dim"):  # fmt: skip
        held: Any = getattr(dense, name, None)
        if held is not None and held < 1:
            raise SettingError(f"{name} is {held}; it must be 1 or more")
    padding = dense.pad_token_id
    if padding is not None and not -dense.vocab_size <= padding < dense.vocab_size:  # -1, of old, is the last
        raise SettingError(f"pad_token_id is {padding}; it must be below vocab_size, {dense.vocab_size}, or null")
    heads, kv_heads = dense.num_attention_heads, dense.num_key_value_heads
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise SettingError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; the former must be a multiple of the "
            "latter, and both 1 or more"
        )
    if heads == kv_heads:
        raise SettingError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; each KV head must serve two query "
            "heads or more, or there is nothing to route (M = 1)"
        )
    window = getattr(dense, "sliding_window", None)
    by_layer = kind in ("qwen2", "qwen3")  # Llama knows no window, and the others know it alone
    slides = "sliding_attention" in dense.layer_types if by_layer else kind != "llama" and window is not None
    if slides and (window is None or window < dense.max_position_embeddings):
        named = "layer_types hold 'sliding_attention', " if by_layer else ""
        raise SettingError(
            f"{named}sliding_window is {window} and max_position_embeddings {dense.max_position_embeddings}; GQE has "
            "no sliding windows, so sliding_window must be null, or no smaller than max_position_embeddings"
        )
    if dense.hidden_act not in ACT2FN:
        raise SettingError(f"hidden_act is {dense.hidden_act!r}; it must be an activation that Transformers knows")
    dropout = dense.attention_dropout
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise SettingError(f"attention_dropout is {dropout!r}; it must be a number, 0 or more and below 1")
    theta = dense.rope_parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise SettingError(f"rope_theta is {theta!r}; it must be a number above 0")
    rope_type = dense.rope_parameters.get("rope_type", "default")
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        raise SettingError(
            f"rope_type is {rope_type!r}; it must be default or one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    if getattr(dense, "quantization_config", None) is not None:
        raise SettingError("quantization_config is set; the weights must be plain (quantise them after converting)")
    for name in ("resid_pdrop", "embd_pdrop"):
        held = getattr(dense, name, 0)
        if held:
            raise SettingError(f"{name} is {held}; GQE has no such dropout, so it must be 0")
