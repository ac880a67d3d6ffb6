"""The arms of the study: what each changes, as a configuration. Dense arms are stock Llama."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from query_experts.common.errors import SettingError
from query_experts.model.configuration_gqe import GQEConfig

ARMS = {
    "dense": "stock Llama: every query head attends, for every token",
    "static": "as many always-on heads as gqe has active, and no router",
    "half": "stock Llama with fewer query heads, MLP widened to gqe's parameters",
    "frozen": "gqe with a random router that never trains",
    "gqe": "grouped query experts, as in the paper",
    "hard": "ablation: the selected heads alone, no weighted slot, no shared head",
    "weighted": "ablation: selected heads scaled by their probability",
    "gqe-m4": "gqe with twice the experts, and as many of them active",
    "gqe-expert": "gqe with output rows per expert instead of per slot",
}


def in_order(arms: Iterable[str]) -> list[str]:
    """The arms, each once, in the study's order."""
    return sorted(set(arms), key=list(ARMS).index)


@dataclass(frozen=True)
class ModelSize:
    """The dense model that every arm starts from: N `num_attention_heads` over G `num_key_value_heads`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    active_query_experts: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    router_aux_loss_coef: float
    router_z_loss_coef: float


def arm_config(arm: str, size: ModelSize) -> LlamaConfig:
    """The configuration of an arm. Raises SettingError for an unknown arm or a size that it can't be built from."""
    shape: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_position_embeddings,
        "tie_word_embeddings": size.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    router = {
        "active_query_experts": size.active_query_experts,
        "router_aux_loss_coef": size.router_aux_loss_coef,
        "router_z_loss_coef": size.router_z_loss_coef,
    }
    woken = size.num_key_value_heads * size.active_query_experts
    match arm:
        case "dense":
            return LlamaConfig(**shape)
        case "half":
            return _half(shape | {"num_attention_heads": woken}, arm_config("gqe", size))
        case "static":
            return GQEConfig(**shape | router | {"num_attention_heads": woken, "routing": "none"})
        case "frozen":
            return GQEConfig(**shape, **router, routing="frozen")
        case "gqe":
            return GQEConfig(**shape, **router)
        case "hard":
            return GQEConfig(**shape, **router, variant="hard_concat")
        case "weighted":
            return GQEConfig(**shape, **router, variant="weighted_concat")
        case "gqe-m4":
            return GQEConfig(**shape | router | {"num_attention_heads": 2 * size.num_attention_heads})
        case "gqe-expert":
            return GQEConfig(**shape, **router, output_projection="expert")
    raise SettingError(f"arm is {arm!r}; it must be one of {', '.join(ARMS)}")


def build(config: LlamaConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def _half(shape: dict[str, Any], target: GQEConfig) -> LlamaConfig:
    """Widen the MLP to the width whose parameter count comes nearest to the target's."""
    with torch.device("meta"):
        wanted = build(target).num_parameters()
        narrow = build(LlamaConfig(**shape | {"intermediate_size": 1})).num_parameters()
    per_width = 3 * shape["hidden_size"] * shape["num_hidden_layers"]
    return LlamaConfig(**shape | {"intermediate_size": max(1, 1 + round((wanted - narrow) / per_width))})


def check_arms(arms: list[str], size: ModelSize) -> None:
    for arm in arms:
        try:
            arm_config(arm, size)
        except StrictDataclassError as error:  # a wrapper; the sentence is in its cause
            raise SettingError(f"arm {arm}: {error.__cause__ or error}") from error
