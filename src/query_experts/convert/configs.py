"""Builds GQE's configuration from a dense model's, and refuses dense models that can't be converted."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from query_experts.common.errors import SettingError
from query_experts.convert.weight_map import LAYER_RULES
from query_experts.layers.validation import is_number
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.rotary import check_rope_frequencies, check_rope_parameters

COPIED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "dtype",
)  # fmt: skip

# configuration field -> why a model that has it has no GQE form
UNSUPPORTED_FIELDS = {
    "kv_lora_rank": "has multi-head latent attention, where no KV heads group the query heads",
    "no_rope_layers": "has layers without rotary embedding",
    "num_local_experts": "has a mixture of experts in place of the MLP",
    "num_experts": "has a mixture of experts in place of the MLP",
    "attn_logit_softcapping": "caps its attention's logits",
}
MODELS_WITH_SINKS = ("gpt_oss",)


def gqe_config(dense: PreTrainedConfig, top_k: int | None, output_projection: str, variant: str) -> GQEConfig:
    """GQE's configuration with a dense model's sizes.

    top_k: active experts per group; None for all. Raises SettingError for a dense model that can't be converted, and
    for a setting that doesn't fit it.
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
    copied = {name: getattr(dense, name) for name in COPIED_FIELDS}
    return GQEConfig(
        **copied | {"rope_parameters": rope_parameters(dense)},
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        attention_bias=qwen2 or getattr(dense, "attention_bias", False),
        attention_output_bias=False if qwen2 else None,
        mlp_bias=getattr(dense, "mlp_bias", False),
        qk_norm=dense.model_type == "qwen3",
        active_query_experts=experts if top_k is None else top_k,
        output_projection=output_projection,
        variant=variant,
    )


def with_untied_embeddings(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration for weights whose output embedding differs from the input embedding.

    Transformers also unties such weights, whatever the configuration says.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def rope_parameters(dense: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters that the dense model really uses; of these families only Phi-3 rotates part of a head.

    Raises SettingError for scaled frequencies of part of a head in another family.
    """
    parameters = dict(dense.rope_parameters)
    factor = parameters.get("partial_rotary_factor", 1.0)
    if dense.model_type != "phi3" and factor not in (1.0, None):
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "proportional":  # uses the factor in every family
            return parameters
        if rope_type != "default":
            raise SettingError(
                f"rope_parameters hold rope_type {rope_type!r} and partial_rotary_factor {factor}; only phi3 converts "
                f"with both, so partial_rotary_factor must be 1 for {dense.model_type}"
            )
        del parameters["partial_rotary_factor"]  # the dense model ignores it
    return parameters


def check_convertible(dense: PreTrainedConfig) -> None:
    """Raises SettingError, with the reason, for a dense model that has no GQE form."""
    check_model_type(dense)
    check_sizes(dense)
    check_heads(dense)
    check_sliding_window(dense)
    if dense.hidden_act not in ACT2FN:
        raise SettingError(f"hidden_act is {dense.hidden_act!r}; it must be an activation that Transformers knows")
    dropout = dense.attention_dropout
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise SettingError(f"attention_dropout is {dropout!r}; it must be a number, 0 or more and below 1")
    check_rotary(dense)
    if getattr(dense, "quantization_config", None) is not None:
        raise SettingError("quantization_config is set; the weights must be plain (quantise them after converting)")
    for name in ("resid_pdrop", "embd_pdrop"):
        dropout = getattr(dense, name, 0)
        if dropout:
            raise SettingError(f"{name} is {dropout}; GQE has no such dropout, so it must be 0")


def check_model_type(dense: PreTrainedConfig) -> None:
    """Raises SettingError for a family without rules in the weight map."""
    model_type = dense.model_type
    if model_type not in LAYER_RULES:
        reasons = ["has attention sinks"] if model_type in MODELS_WITH_SINKS else []
        reasons += [why for field, why in UNSUPPORTED_FIELDS.items() if getattr(dense, field, None) is not None]
        why = f", which {reasons[0]}" if reasons else ""
        raise SettingError(f"model_type is {model_type!r}{why}; it must be one of {', '.join(sorted(LAYER_RULES))}")


def check_sizes(dense: PreTrainedConfig) -> None:
    """Raises SettingError for sizes below 1 and a padding token outside of the vocabulary."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
                 "head_dim"):  # fmt: skip
        size: int | None = getattr(dense, name, None)
        if size is not None and size < 1:
            raise SettingError(f"{name} is {size}; it must be 1 or more")
    padding = dense.pad_token_id
    if padding is not None and not -dense.vocab_size <= padding < dense.vocab_size:  # old checkpoints: -1, the last
        raise SettingError(f"pad_token_id is {padding}; it must be below vocab_size, {dense.vocab_size}, or null")


def check_heads(dense: PreTrainedConfig) -> None:
    """Raises SettingError unless each KV head serves the same number of query heads, two or more."""
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


def check_sliding_window(dense: PreTrainedConfig) -> None:
    """Raises SettingError for a sliding window that is shorter than the model's length."""
    window = getattr(dense, "sliding_window", None)
    has_layer_types = dense.model_type in ("qwen2", "qwen3")  # Llama has no window; other families slide in all layers
    slides = (
        "sliding_attention" in dense.layer_types
        if has_layer_types
        else dense.model_type != "llama" and window is not None
    )
    if slides and (window is None or window < dense.max_position_embeddings):
        layer_types = "layer_types hold 'sliding_attention', " if has_layer_types else ""
        raise SettingError(
            f"{layer_types}sliding_window is {window} and max_position_embeddings {dense.max_position_embeddings}; GQE "
            "has no sliding windows, so sliding_window must be null, or no smaller than max_position_embeddings"
        )


def check_rotary(dense: PreTrainedConfig) -> None:
    """Raises SettingError for rotary parameters that Transformers can't compute."""
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    try:
        check_rope_parameters(dense, head_dim)
        check_rope_frequencies(dense)
    except ValueError as error:
        raise SettingError(str(error)) from error
