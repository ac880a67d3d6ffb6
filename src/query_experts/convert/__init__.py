"""From the checkpoint that one has to a GQE model that starts out equal: `from_dense`, and `from_reference`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from query_experts.common.errors import SettingError
from query_experts.convert.configs import gqe_config, untied
from query_experts.convert.layers import ROUTERS, Plan
from query_experts.convert.pipeline import Report, convert
from query_experts.convert.weight_map import LAYER, LAYERS, OUTSIDE, to_dense
from query_experts.layers.attention import GQEAttention
from query_experts.model.modeling_gqe import GQEForCausalLM

__all__ = ["Report", "convert_model", "dense_tensors", "from_dense", "from_reference", "make_plan"]


def from_dense(model: PreTrainedModel, top_k: int | None = None, **options: Any) -> GQEForCausalLM:
    """A dense Llama-like model -> a GQE model with copies of its weights. Options: those of `convert_model`.

    top_k: the experts that a token wakes in a group; None, all M, and then (by `expert`) logits are the dense model's.
    Raises SettingError for a model that can't be converted, with the reason.
    """
    return convert_model(model, top_k, **options)[0]


def convert_model(
    model: PreTrainedModel,
    top_k: int | None = None,
    *,
    output_projection: str = "expert",
    variant: str = "gqe",
    router: str | None = None,
    calibration: Tensor | None = None,
    seed: int = 0,
) -> tuple[GQEForCausalLM, Report]:
    """As `from_dense`, and what the conversion came to.

    output_projection: `expert`, exact at k = M; `slot`, the paper's, where a slot starts with the mean of its group's
        rows of W_O and nothing is exact. variant: `gqe`, whose two extra slots start at zero, or `hard_concat`.
    router: `random`, `query_norm`, `calibrated` or `none`, as in `convert.layers.Plan`; None, `calibrated` if there is
        text and else `random`. calibration: token ids [sequences, T] that the dense model is observed on, every fifth
        sequence held out to judge by; some thousand tokens. seed: of what is drawn at random.
    """
    source = InMemory(model)
    plan = make_plan(source.config, top_k, output_projection, variant, router, seed, calibration is not None)
    tensors: dict[str, Tensor] = {}
    report = Report()
    for part in convert(source, plan, calibration, report):
        tensors |= {name: tensor.clone() for name, tensor in part.items()}
    converted = GQEForCausalLM.from_pretrained(
        None, config=plan.final, state_dict=tensors, dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )  # fmt: skip
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.to(model.device), report


def make_plan(
    dense: PreTrainedConfig,
    top_k: int | None,
    output_projection: str,
    variant: str,
    router: str | None,
    seed: int,
    has_text: bool,
) -> Plan:
    """Raises SettingError for settings that don't go together."""
    router = router or ("calibrated" if has_text else "random")
    if router not in ROUTERS:
        raise SettingError(f"router is {router!r}; it must be one of {', '.join(ROUTERS)}")
    full = gqe_config(dense, None, "expert", variant)
    final = gqe_config(dense, top_k, output_projection, variant)
    if router == "none":
        final.routing, final.output_projection = "none", "slot"  # the same where all experts are on
        final.num_attention_heads = final.active_query_experts * final.num_key_value_heads
    plan = Plan(dense.model_type, full, final, router, seed)
    if plan.needs_text and not has_text:
        raise SettingError(f"router is {router!r}, which is fitted to text; calibration (--calibrate) must be given")
    return plan


class InMemory:
    """A dense model that is loaded."""

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "lm_head"):
            raise SettingError(f"model is {type(model).__name__}; it must be a Transformers model for causal LM")
        self.config = model.config
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
        self.rest = model.state_dict()
        for name in list(self.rest):
            number, _, inner = name.removeprefix(LAYERS).partition(".")
            if name.startswith(LAYERS) and int(number) < len(self.layers):
                self.layers[int(number)][inner] = self.rest.pop(name)
        if model.config.tie_word_embeddings and "lm_head.weight" in self.rest:
            if torch.equal(self.rest["lm_head.weight"], self.rest["model.embed_tokens.weight"]):
                del self.rest["lm_head.weight"]
            else:
                self.config = untied(model.config)

    def outside(self) -> dict[str, Tensor]:
        return self.rest

    def layer(self, number: int) -> dict[str, Tensor]:
        return self.layers[number]


def dense_tensors(model: GQEForCausalLM, model_type: str) -> dict[str, Tensor]:
    """The dense model's tensors in a GQE model by `expert`: what `from_dense` took, as long as it wasn't trained."""
    if model.config.output_projection != "expert":
        raise SettingError(f"output_projection is {model.config.output_projection!r}; it must be expert")
    source = InMemory(model)
    tensors = to_dense(source.outside(), OUTSIDE, model.config)
    for number in range(model.config.num_hidden_layers):
        layer = to_dense(source.layer(number), LAYER[model_type], model.config)
        tensors |= {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def from_reference(
    tensors: Mapping[str, Tensor], variant: str = "gqe", rope_theta: float | None = 10_000.0
) -> GQEAttention:
    """The paper's reference layer -> `GQEAttention` of the same values, its shape read off the tensors.

    tensors: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, `o_proj.weight`, `router.weight`, and `q_shared.weight`
    for the variant `gqe`; biases with them. Raises SettingError where they are no such layer.
    """
    held = dict(tensors)
    needed = ["q_proj", "k_proj", "v_proj", "o_proj", "router", *(["q_shared"] if variant == "gqe" else [])]
    for name in needed:
        if f"{name}.weight" not in held:
            raise SettingError(f"tensors hold no {name}.weight; for variant {variant!r} they must")
    experts, hidden_size = held["router.weight"].shape
    head_dim = held["q_proj.weight"].shape[0] // experts
    groups = held["k_proj.weight"].shape[0] // max(1, head_dim)
    slots = held["o_proj.weight"].shape[1] // max(1, head_dim) - (2 if variant == "gqe" else 0)
    try:
        layer = GQEAttention(
            hidden_size, experts, groups, slots // max(1, groups), head_dim, variant, rope_theta=rope_theta,
            bias="q_proj.bias" in held, output_bias="o_proj.bias" in held,
        )  # fmt: skip
        layer.to(held["q_proj.weight"]).load_state_dict(held)
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"tensors are no {variant} layer: {' '.join(str(error).split())[:300]}") from error
    return layer
