"""GQEConfig: Llama's configuration, and the fields that Grouped Query Experts add."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from query_experts.layers.validation import CONFIG_NAMES, check_layout, default_head_dim, is_number
from query_experts.model.remote_code import AUTO_MAP, write_shim
from query_experts.model.rotary import check_rope_frequencies, check_rope_parameters, without_none

# from 5.20 on, Transformers has what `tensor_parallel` needs
SHARDS_BY_GROUP = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) >= (5, 20)
KV_GROUPS = "gqe_kv_groups"  # the style that `tensor_parallel` registers
ATTENTION_TP_PLAN = {
    "layers.*.self_attn": KV_GROUPS,
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "colwise_gather_output",
}
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")  # which Transformers' caches obey in any model


@strict
class GQEConfig(LlamaConfig):
    """Configuration of a GQE language model: Llama's fields, with the ones below.

    In Llama's fields, `num_attention_heads` is N, the query experts, and `num_key_value_heads` is G, the KV heads.

    Args:
        active_query_experts: k, the experts that a token selects in each group.
        variant: as in `GQEAttention`, like the next three and qk_norm.
        output_projection: `slot` or `expert`.
        routing: `learned`, `frozen` or `none`.
        shared_head_kv: `mean` or `first`.
        attention_output_bias: whether o_proj has a bias; None for the same as `attention_bias`.
        qk_norm: RMSNorm of queries and keys over the head dim.
        router_aux_loss_coef: weight of the balance loss (sum over layers; 0.01 in the paper, section 4).
        router_z_loss_coef: weight of the z-loss (ST-MoE, arXiv 2202.08906): the mean squared logsumexp of a group's
            logits, summed over layers. It keeps router logits small. The paper has none.
        output_router_logits: add `router_logits` and `aux_loss` to the output; the loss stays the same.

    Raises:
        StrictDataclassError: naming the field, what it held and what is allowed.
    """

    model_type = "gqe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "lm_loss", "task_loss", "aux_loss", "router_logits",
    ]  # fmt: skip
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **(ATTENTION_TP_PLAN if SHARDS_BY_GROUP else {}),  # else every rank has all of attention
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    active_query_experts: int = 1
    variant: str = "gqe"
    output_projection: str = "slot"
    routing: str = "learned"
    shared_head_kv: str = "mean"
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, field in CONFIG_NAMES.items():
            if name in kwargs:  # would be kept as a field without effect
                raise ValueError(f"{name} is {kwargs[name]!r}; in GQEConfig this field is called {field}")
        for name in ("kernels", "fused_decode"):
            if name in kwargs:
                raise ValueError(
                    f"{name} is {kwargs[name]!r}; it is no field: a model's set_kernels chooses the kernels"
                )
        for name in ("hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.head_dim is None:
            default_head_dim(self.hidden_size, self.num_attention_heads, CONFIG_NAMES)  # Llama's drops a remainder
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of strict validation. `hidden_size` need not be a multiple of N where `head_dim` is given."""
        check_layout(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.active_query_experts,
            self.head_dim, True, self.variant, self.output_projection, self.routing, self.shared_head_kv,
            CONFIG_NAMES,
        )  # fmt: skip
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "rms_norm_eps"):
            number = getattr(self, name)
            if not (is_number(number) and number >= 0):
                raise ValueError(f"{name} is {number!r}; it must be a number, 0 or more")
        dropout = self.attention_dropout
        if not (is_number(dropout) and 0 <= dropout < 1):
            raise ValueError(f"attention_dropout is {dropout!r}; it must be a number, 0 or more and below 1")
        for name in WINDOW_FIELDS:
            if (window := getattr(self, name, None)) is not None:
                raise ValueError(f"{name} is {window!r}; GQE has no such field, so it must be left out, or None")
        if other := set(getattr(self, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"layer_types hold {min(other)!r}; in GQE all must be 'full_attention'")

    def validate_rope(self) -> None:
        """Part of strict validation, as Transformers', which warns of what gives NaN or an error later."""
        check_rope_parameters(self, self.head_dim)
        self.rope_parameters = without_none(self.rope_parameters)  # type: ignore[has-type]
        super().validate_rope()
        check_rope_frequencies(self)

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError. TRL reads num_experts to balance one list of experts per layer, which GQE hasn't.

        (Not a property, because vLLM sets a field of this name to record routing.)
        """
        if name == "num_experts":
            raise AttributeError(
                "GQEConfig has no num_experts: its experts are balanced within each group, by the model's own loss. "
                "TRL's trainers don't use that loss: for no balance loss set router_aux_loss_coef=0.0 in DPOConfig, "
                "KTOConfig, GRPOConfig, RLOOConfig or SFTConfig; for SFT with it use query_experts.sft.GQESFTTrainer"
            )
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As Transformers', with the shim that `trust_remote_code` loads the checkpoint by.

        A model's `save_pretrained`, `push_to_hub` and the Trainer call this.
        """
        if not Path(save_directory).is_file():  # Transformers refuses a file
            write_shim(Path(save_directory))
        self.auto_map = dict(AUTO_MAP)  # replaces the one that a checkpoint was loaded with
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: Transformers calls it after it followed the shim, and would save this source in its place."""
