"""GQEConfig: Llama's configuration and what Grouped Query Experts add to it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from query_experts.layers.validation import check_layout
from query_experts.model.remote_code import AUTO_MAP, write_shim

LAYERS_NAMES = {
    "num_query_experts": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "active_query_experts",
}


@strict
class GQEConfig(LlamaConfig):
    """Llama's fields (`num_attention_heads`: N query experts, `num_key_value_heads`: G KV heads), and:

    active_query_experts: k, the experts that a token wakes in each group.
    variant, output_projection, routing, shared_head_kv, qk_norm: as in `GQEAttention`.
    attention_output_bias: whether o_proj has a bias; None, as `attention_bias` says of all projections.
    router_aux_loss_coef: weight of the balance loss (sum over layers; 0.01 in the paper, section 4).
    router_z_loss_coef: weight of the z-loss (ST-MoE, arXiv 2202.08906), the mean squared logsumexp of a group's
        logits, summed over layers; keeps router logits small. The paper has none.
    output_router_logits: adds `router_logits` and `aux_loss` to the output; the loss is the same either way.

    Raises a validation error that names the field, what it held and what is allowed.
    """

    model_type = "gqe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "lm_loss", "aux_loss", "router_logits"]
    # 10 output slots don't split as 16 heads do: attention is replicated over tensor-parallel ranks, the MLP is split
    base_model_tp_plan: ClassVar[dict[str, str]] = {
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
        for name, field in LAYERS_NAMES.items():
            if name in kwargs:  # which would be kept as a field of no meaning
                raise ValueError(f"{name} is {kwargs[name]!r}; in GQEConfig this field is called {field}")
        for name in ("hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; without head_dim it must be a multiple of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of strict validation. `hidden_size` need not be a multiple of N where `head_dim` is given."""
        check_layout(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.active_query_experts,
            self.head_dim, True, self.variant, self.output_projection, self.routing, self.shared_head_kv,
        )  # fmt: skip
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            held = getattr(self, name)
            if not isinstance(held, int | float) or not 0 <= held < math.inf:
                raise ValueError(f"{name} is {held!r}; it must be a number, 0 or more")

    def __getattr__(self, name: str) -> Any:
        """Of what isn't there. Whoever reads num_experts (TRL) is about to balance one list of experts a layer.

        (Not a property: vLLM, to record routing, sets a field of this name.) Raises AttributeError.
        """
        if name == "num_experts":
            raise AttributeError(
                "GQEConfig has no num_experts: its experts are balanced within each group, by the model's loss. With "
                "TRL, use query_experts.sft.GQESFTTrainer, or SFTConfig(router_aux_loss_coef=0.0) for no balance loss"
            )
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As Transformers', and the shim beside it by which `trust_remote_code` loads the checkpoint anywhere.

        A model's `save_pretrained`, `push_to_hub` and the Trainer come through here.
        """
        if not Path(save_directory).is_file():  # which Transformers refuses
            write_shim(Path(save_directory))
        self.auto_map = dict(AUTO_MAP)  # in place of the one that a checkpoint was loaded with
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing. Transformers asks for it once it followed the shim, and would save this source in its place."""
