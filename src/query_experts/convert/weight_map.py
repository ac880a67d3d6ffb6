"""The map of tensor names between dense Llama-like checkpoints and GQE's, as data; and the two directions through it.

A rule of the map says in which GQE tensors the rows of a dense tensor go. Nearly all go into one of the same name. Two
things happen besides: fused projections are taken apart, and W_O gets columns of zeros for GQE's two extra slots. What
GQE has and dense models don't (`router`, `q_shared`) stands in no rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from query_experts.common.errors import SettingError
from query_experts.model.configuration_gqe import GQEConfig

LAYERS = "model.layers."  # stands before a layer's number
O_PROJ = "self_attn.o_proj.weight"
LEFT_OUT = ("rotary_emb.inv_freq",)  # of old checkpoints; computed from the configuration


@dataclass(frozen=True)
class WeightRule:
    """A dense tensor and where its rows go, in that order. optional: a model may have it (a bias) or not."""

    dense: str
    gqe: tuple[str, ...]
    optional: bool = False


def same(*names: str, optional: bool = False) -> tuple[WeightRule, ...]:
    return tuple(WeightRule(name, (name,), optional) for name in names)


OUTSIDE = (
    *same("model.embed_tokens.weight", "model.norm.weight"),
    *same("lm_head.weight", optional=True),  # not where it is tied to the embeddings
)
NORMS = same("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = same("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", O_PROJ)
ATTENTION_BIAS = same(
    "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.o_proj.bias", optional=True
)
QK_NORM = same("self_attn.q_norm.weight", "self_attn.k_norm.weight")
MLP = same("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
MLP_BIAS = same("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias", optional=True)
FUSED = (
    WeightRule(
        "self_attn.qkv_proj.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    WeightRule("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    *same(O_PROJ, "mlp.down_proj.weight"),
)

# model_type -> what a decoder layer holds
LAYER = {
    "llama": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *MLP, *MLP_BIAS),
    "mistral": (*NORMS, *ATTENTION, *MLP),
    "qwen2": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *MLP),
    "qwen3": (*NORMS, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *MLP),
    "phi3": (*NORMS, *FUSED),
}


def to_gqe(
    dense: dict[str, Tensor], rules: tuple[WeightRule, ...], config: GQEConfig, where: str = ""
) -> dict[str, Tensor]:
    """Dense tensors -> GQE's of the same values, by `expert` and with all experts kept.

    where: what the names stand behind, for messages. Raises SettingError for a tensor that is missing, unknown or of
    another shape.
    """
    rest = {name: t for name, t in dense.items() if not name.endswith(LEFT_OUT)}
    ours: dict[str, Tensor] = {}
    for rule in rules:
        tensor = rest.pop(rule.dense, None)
        if tensor is None:
            if not rule.optional:
                raise SettingError(f"checkpoint has no tensor {where}{rule.dense}; it must have it")
            continue
        rows = [_rows(name, config) for name in rule.gqe] if len(rule.gqe) > 1 else [tensor.shape[0]]
        if sum(rows) != tensor.shape[0]:
            raise SettingError(
                f"{where}{rule.dense} has {tensor.shape[0]} rows; by its config it must have {sum(rows)}"
            )
        ours |= zip(rule.gqe, tensor.split(rows), strict=True)
    if rest:
        raise SettingError(f"checkpoint has a tensor {where}{min(rest)}, for which GQE has no place")
    if O_PROJ in ours:
        ours[O_PROJ] = with_extra_slots(ours[O_PROJ], config)
    return ours


def to_dense(ours: dict[str, Tensor], rules: tuple[WeightRule, ...], config: GQEConfig) -> dict[str, Tensor]:
    """The reverse: the dense tensors in a GQE model by `expert`, without its router and its extra slots."""
    dense = {
        rule.dense: torch.cat([ours[name] for name in rule.gqe]) for rule in rules if all(n in ours for n in rule.gqe)
    }
    if O_PROJ in dense:
        dense[O_PROJ] = dense[O_PROJ][:, : config.num_attention_heads * config.head_dim].contiguous()
    return dense


def with_extra_slots(o_proj: Tensor, config: GQEConfig) -> Tensor:
    """W_O [D, N*d] with zeros for the weighted slot and the shared head, [D, (N + 2)*d], where the variant has them."""
    extra = 2 * config.head_dim if config.variant == "gqe" else 0
    return torch.cat([o_proj, o_proj.new_zeros(o_proj.shape[0], extra)], 1) if extra else o_proj


def _rows(name: str, config: GQEConfig) -> int:
    """Rows of a tensor that dense models may have fused with others."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads["v_proj"] = config.num_key_value_heads
    projection = name.split(".")[-2]
    return heads[projection] * config.head_dim if projection in heads else config.intermediate_size
