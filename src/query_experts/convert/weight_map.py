"""Maps tensor names between dense Llama-like checkpoints and GQE, as data, and applies the map in both directions.

A rule says which GQE tensors receive the rows of a dense tensor. Nearly all rules keep the name. Two changes come on
top: fused projections are split, and W_O gets columns of zeros for GQE's two extra slots. No rule covers `router` and
`q_shared`, which dense models don't have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from query_experts.common.errors import SettingError
from query_experts.model.configuration_gqe import GQEConfig

LAYER_PREFIX = "model.layers."  # followed by a layer's number
O_PROJ = "self_attn.o_proj.weight"
IGNORED_TENSORS = ("rotary_emb.inv_freq",)  # in old checkpoints; the model computes it from the configuration


@dataclass(frozen=True)
class WeightRule:
    """A dense tensor, and the GQE tensors that receive its rows, in that order.

    optional: whether a checkpoint may lack the tensor, such as a bias.
    """

    dense: str
    gqe: tuple[str, ...]
    optional: bool = False


def same_names(*names: str, optional: bool = False) -> tuple[WeightRule, ...]:
    return tuple(WeightRule(name, (name,), optional) for name in names)


OUTSIDE_RULES = (
    *same_names("model.embed_tokens.weight", "model.norm.weight"),
    *same_names("lm_head.weight", optional=True),  # absent if it is tied to the embeddings
)
NORMS = same_names("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = same_names("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", O_PROJ)
ATTENTION_BIAS = same_names(
    "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.o_proj.bias", optional=True
)
QK_NORM = same_names("self_attn.q_norm.weight", "self_attn.k_norm.weight")
MLP = same_names("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
MLP_BIAS = same_names("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias", optional=True)
FUSED = (
    WeightRule(
        "self_attn.qkv_proj.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    WeightRule("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    *same_names(O_PROJ, "mlp.down_proj.weight"),
)

# model_type -> rules for the tensors of a decoder layer
LAYER_RULES = {
    "llama": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *MLP, *MLP_BIAS),
    "mistral": (*NORMS, *ATTENTION, *MLP),
    "qwen2": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *MLP),
    "qwen3": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *MLP),
    "phi3": (*NORMS, *FUSED),
}


def to_gqe(
    dense: dict[str, Tensor], rules: tuple[WeightRule, ...], config: GQEConfig, prefix: str = ""
) -> dict[str, Tensor]:
    """Dense tensors -> GQE tensors of the same values, by `expert` and with all experts.

    prefix: text before the names in error sentences. Raises SettingError for a tensor that is missing, unknown or of
    another shape.
    """
    rest = {name: t for name, t in dense.items() if not name.endswith(IGNORED_TENSORS)}
    gqe: dict[str, Tensor] = {}
    for rule in rules:
        tensor = rest.pop(rule.dense, None)
        if tensor is None:
            if not rule.optional:
                raise SettingError(f"checkpoint has no tensor {prefix}{rule.dense}; it must have it")
            continue
        rows = [_num_rows(name, config) for name in rule.gqe] if len(rule.gqe) > 1 else [tensor.shape[0]]
        if sum(rows) != tensor.shape[0]:
            raise SettingError(
                f"{prefix}{rule.dense} has {tensor.shape[0]} rows; by its config it must have {sum(rows)}"
            )
        gqe |= zip(rule.gqe, tensor.split(rows), strict=True)
    if rest:
        raise SettingError(f"checkpoint has a tensor {prefix}{min(rest)}, for which GQE has no place")
    if O_PROJ in gqe:
        gqe[O_PROJ] = with_extra_slots(gqe[O_PROJ], config)
    return gqe


def to_dense(gqe: dict[str, Tensor], rules: tuple[WeightRule, ...], config: GQEConfig) -> dict[str, Tensor]:
    """The reverse of `to_gqe`: leaves out the router, the shared head and the extra slots."""
    dense = {
        rule.dense: torch.cat([gqe[name] for name in rule.gqe]) for rule in rules if all(n in gqe for n in rule.gqe)
    }
    if O_PROJ in dense:
        dense[O_PROJ] = dense[O_PROJ][:, : config.num_attention_heads * config.head_dim].contiguous()
    return dense


def with_extra_slots(o_proj: Tensor, config: GQEConfig) -> Tensor:
    """W_O [D, N*d] -> [D, (N + 2)*d], with zeros for the weighted slot and the shared head, if the variant has them."""
    extra = 2 * config.head_dim if config.variant == "gqe" else 0
    return torch.cat([o_proj, o_proj.new_zeros(o_proj.shape[0], extra)], 1) if extra else o_proj


def _num_rows(name: str, config: GQEConfig) -> int:
    """Rows of a GQE tensor that dense models may have fused with others."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads["v_proj"] = config.num_key_value_heads
    projection = name.split(".")[-2]
    return heads[projection] * config.head_dim if projection in heads else config.intermediate_size
