"""The arms of the study: what each changes, as a configuration. Dense arms are stock Llama."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from query_experts.common.errors import SettingError
from query_experts.common.fields import Count, NonNegative, help_entry
from query_experts.layers.validation import CONFIG_NAMES, check_heads
from query_experts.model.configuration_gqe import GQEConfig

ARMS = {
    "dense": "stock Llama: every query head attends, for every token",
    "static": "gqe without the router: as many heads as it has active, always the same",
    "half": "stock Llama with fewer query heads, MLP widened to gqe's parameters",
    "frozen": "gqe with a random router that never trains",
    "gqe": "grouped query experts, as in the paper",
    "hard": "ablation: only the selected heads, no weighted slot, no shared head",
    "weighted": "ablation: selected heads scaled by their probability",
    "gqe-m4": "gqe with twice the experts, and as many of them active",
    "gqe-m8": "gqe with four times the experts, and as many of them active",
    "gqe-expert": "gqe with output rows per expert instead of per slot",
}


def in_order(arms: Iterable[str]) -> list[str]:
    """The arms, each once, in the study's order."""
    return sorted(set(arms), key=list(ARMS).index)


@dataclass(frozen=True)
class ModelSize:
    """The dense model that every arm starts from, with N query heads in G groups.

    The fields and their help texts are those of the commands' settings; see `size_option`.
    """

    vocab_size: Count = field(metadata=help_entry("vocabulary of the model; a tokenizer must fit into it", "model"))
    hidden_size: Count = field(metadata=help_entry("hidden size D", "model"))
    intermediate_size: Count = field(metadata=help_entry("MLP width", "model"))
    num_hidden_layers: Count = field(metadata=help_entry("layers of the model", "model"))
    num_attention_heads: Count = field(
        metadata=help_entry("query heads N of the dense arm, query experts of the others", "model")
    )
    num_key_value_heads: Count = field(metadata=help_entry("KV heads G, one for each group", "model"))
    head_dim: Count = field(metadata=help_entry("head dim, an even number", "model"))
    active_query_experts: Count = field(metadata=help_entry("active experts per group, k", "model"))
    max_position_embeddings: Count = field(metadata=help_entry("longest sequence", "model"))
    tie_word_embeddings: bool = field(
        metadata=help_entry("one table for input and output embeddings; --no_tie_word_embeddings for two", "model")
    )
    router_aux_loss_coef: NonNegative = field(metadata=help_entry("weight of the balance loss", "training"))
    router_z_loss_coef: NonNegative = field(metadata=help_entry("weight of the router z-loss", "training"))
    initializer_range: NonNegative = field(
        default=0.02, metadata=help_entry("standard deviation of initial weights", "model")
    )

    def check(self) -> None:
        """Raises SettingError for heads that don't fit together."""
        try:
            check_heads(
                self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.active_query_experts,
                self.head_dim, True, CONFIG_NAMES,
            )  # fmt: skip
        except ValueError as error:
            raise SettingError(str(error)) from error


def size_option(name: str, default: Any) -> Any:
    """A setting for one of the sizes, with the help text that `ModelSize` has for it."""
    declared = {f.name: f for f in fields(ModelSize)}
    return field(default=default, metadata=declared[name].metadata)


def model_size(settings: Any, **more: Any) -> ModelSize:
    """The sizes among the settings of a command.

    Args:
        more: The sizes that the command has no setting for.
    """
    given = {f.name: getattr(settings, f.name) for f in fields(ModelSize) if hasattr(settings, f.name)}
    return ModelSize(**given | more)


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
        "initializer_range": size.initializer_range,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    router = {
        "active_query_experts": size.active_query_experts,
        "router_aux_loss_coef": size.router_aux_loss_coef,
        "router_z_loss_coef": size.router_z_loss_coef,
    }
    active_heads = size.num_key_value_heads * size.active_query_experts
    match arm:
        case "dense":
            return LlamaConfig(**shape)
        case "half":
            return _half(shape | {"num_attention_heads": active_heads}, arm_config("gqe", size))
        case "static":
            return GQEConfig(**shape | router | {"num_attention_heads": active_heads, "routing": "none"})
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
        case "gqe-m8":
            return GQEConfig(**shape | router | {"num_attention_heads": 4 * size.num_attention_heads})
        case "gqe-expert":
            return GQEConfig(**shape, **router, output_projection="expert")
    raise SettingError(f"arm is {arm!r}; it must be one of {', '.join(ARMS)}")


def fused_dense_config(size: ModelSize) -> GQEConfig:
    """Dense grouped-query attention as a GQE layer: all experts, no router, no further slot.

    Weights and outputs are those of the arm `dense`; the layer can run GQE's kernels. Only `bench` has this arm.
    """
    experts = size.num_attention_heads // size.num_key_value_heads
    everything = {"routing": "none", "variant": "hard_concat", "active_query_experts": experts}
    return GQEConfig(**vars(size) | everything, bos_token_id=None, eos_token_id=None)


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
    """Raises SettingError for an unknown arm, and for sizes that an arm can't be built from."""
    size.check()
    for arm in arms:
        try:
            arm_config(arm, size)
        except StrictDataclassError as error:  # a wrapper; the sentence is in its cause
            raise SettingError(f"arm {arm}: {error.__cause__ or error}") from error
