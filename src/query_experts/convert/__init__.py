"""Makes a GQE model of a dense one, with equal logits if all experts are active, or a layer of the paper's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from query_experts.common.errors import SettingError
from query_experts.convert.configs import gqe_config, with_untied_embeddings
from query_experts.convert.layers import ROUTERS, Plan
from query_experts.convert.pipeline import Report, convert_in_parts
from query_experts.convert.weight_map import LAYER_PREFIX, LAYER_RULES, OUTSIDE_RULES, to_dense
from query_experts.layers.attention import GQEAttention
from query_experts.model.modeling_gqe import GQEForCausalLM

__all__ = ["Report", "convert_model", "dense_tensors", "from_dense", "from_reference", "make_plan"]


def from_dense(model: PreTrainedModel, top_k: int | None = None, **options: Any) -> GQEForCausalLM:
    """Make a GQE model of a dense Llama-like model.

    With all experts active and `output_projection="expert"`, its logits are the dense model's.

    Args:
        model: a causal language model of Transformers: Llama, Mistral, Qwen2, Qwen3 or Phi-3.
        top_k: active experts per group, 1 to M; None for all M.
        **options: the keyword arguments of `convert_model`.

    Returns:
        A model with copies of the dense model's weights, on its device and in its dtype.

    Raises:
        SettingError: for a model that can't be converted, with the reason, and for an option that doesn't fit it.
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
    """Make a GQE model of a dense model, as `from_dense` does, and report what the conversion measured.

    Args:
        model: a causal language model of Transformers: Llama, Mistral, Qwen2, Qwen3 or Phi-3.
        top_k: active experts per group, 1 to M; None for all M.
        output_projection: `expert`, which equals the dense model at k = M; or `slot`, the paper's, where each slot
            starts with the mean of its group's columns of W_O and nothing is exact.
        variant: `gqe`, whose two extra slots start at zero; or `hard_concat`, which has none.
        router: how the router starts: `random`, `query_norm`, `calibrated` or `none`, as in `convert.layers.Plan`.
            None means `calibrated` with text, `random` without.
        calibration: token ids [sequences, T], int64 or int32, five sequences or more, to run the dense model on. Every
            fifth sequence is held out and judges the conversion. A few thousand tokens are enough.
        seed: of the random numbers.

    Returns:
        The converted model, and the report.

    Raises:
        SettingError: for a model that can't be converted, with the reason, and for an option that doesn't fit it.
    """
    source = LoadedModel(model)
    plan = make_plan(source.config, top_k, output_projection, variant, router, seed, calibration is not None)
    tensors: dict[str, Tensor] = {}
    report = Report()
    for part in convert_in_parts(source, plan, calibration, report):
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
    """Check a conversion's settings and build the configurations that it leads to.

    Args:
        dense: the dense model's configuration.
        top_k, output_projection, variant, router, seed: as in `convert_model`.
        has_text: whether there is text to calibrate on.

    Raises:
        SettingError: for a dense model that can't be converted, and for settings that don't fit it or one another.
    """
    router = router or ("calibrated" if has_text else "random")
    if router not in ROUTERS:
        raise SettingError(f"router is {router!r}; it must be one of {', '.join(ROUTERS)}")
    full = gqe_config(dense, None, "expert", variant)
    final = gqe_config(dense, top_k, output_projection, variant)
    if router == "none":
        final.routing, final.output_projection = "none", "slot"  # expert and slot are equal if all experts are active
        final.num_attention_heads = final.active_query_experts * final.num_key_value_heads
    plan = Plan(dense.model_type, full, final, router, seed)
    if plan.needs_text and not has_text:
        raise SettingError(f"router is {router!r}, which is fitted to text; calibration (--calibrate) must be given")
    return plan


class LoadedModel:
    """The tensors of a model in memory, as `convert_in_parts` reads them."""

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "lm_head"):
            raise SettingError(f"model is {type(model).__name__}; it must be a Transformers model for causal LM")
        self.config = model.config
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
        self.rest = model.state_dict()
        if offloaded := next((name for name, tensor in self.rest.items() if tensor.is_meta), None):
            raise SettingError(
                f"model has no values in memory for {offloaded} (it is offloaded, or on the meta device); it must have "
                "them for all weights"
            )
        for name in list(self.rest):
            number, _, name_in_layer = name.removeprefix(LAYER_PREFIX).partition(".")
            if name.startswith(LAYER_PREFIX) and int(number) < len(self.layers):
                self.layers[int(number)][name_in_layer] = self.rest.pop(name)
        if model.config.tie_word_embeddings and "lm_head.weight" in self.rest:
            if torch.equal(self.rest["lm_head.weight"], self.rest["model.embed_tokens.weight"]):
                del self.rest["lm_head.weight"]
            else:
                self.config = with_untied_embeddings(model.config)

    def outside(self) -> dict[str, Tensor]:
        return self.rest

    def layer(self, number: int) -> dict[str, Tensor]:
        return self.layers[number]


def dense_tensors(model: GQEForCausalLM, model_type: str) -> dict[str, Tensor]:
    """The dense model's tensors in a converted model; those that `from_dense` took, unless it was trained since.

    Args:
        model: a GQE model with `output_projection="expert"`.
        model_type: the dense model's, such as "llama".

    Returns:
        The tensors by their names in the dense model, without router, shared head and extra slots.

    Raises:
        SettingError: for a model with another output projection.
    """
    if model.config.output_projection != "expert":
        raise SettingError(f"output_projection is {model.config.output_projection!r}; it must be expert")
    source = LoadedModel(model)
    tensors = to_dense(source.outside(), OUTSIDE_RULES, model.config)
    for number in range(model.config.num_hidden_layers):
        layer = to_dense(source.layer(number), LAYER_RULES[model_type], model.config)
        tensors |= {f"{LAYER_PREFIX}{number}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def from_reference(
    tensors: Mapping[str, Tensor], variant: str = "gqe", rope_theta: float | None = 10_000.0
) -> GQEAttention:
    """Make a `GQEAttention` of the weights of the paper's reference layer (arXiv 2606.20945).

    Args:
        tensors: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, `o_proj.weight`, `router.weight`; for the variant
            `gqe` also `q_shared.weight`; and their biases, if any. Their shapes give the layer's sizes.
        variant: `gqe`, `hard_concat` or `weighted_concat`.
        rope_theta: base of the rotary embedding; None for a layer without.

    Returns:
        A layer with the same values, dtype and device.

    Raises:
        SettingError: for tensors that are no such layer.
    """
    tensors = dict(tensors)
    needed = ["q_proj", "k_proj", "v_proj", "o_proj", "router", *(["q_shared"] if variant == "gqe" else [])]
    for name in needed:
        if f"{name}.weight" not in tensors:
            raise SettingError(f"tensors hold no {name}.weight; for variant {variant!r} they must")
    experts, hidden_size = tensors["router.weight"].shape
    head_dim = tensors["q_proj.weight"].shape[0] // experts
    groups = tensors["k_proj.weight"].shape[0] // max(1, head_dim)
    slots = tensors["o_proj.weight"].shape[1] // max(1, head_dim) - (2 if variant == "gqe" else 0)
    try:
        layer = GQEAttention(
            hidden_size, experts, groups, slots // max(1, groups), head_dim, variant, rope_theta=rope_theta,
            bias="q_proj.bias" in tensors, output_bias="o_proj.bias" in tensors,
        )  # fmt: skip
        layer.to(tensors["q_proj.weight"]).load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"tensors are no {variant} layer: {' '.join(str(error).split())[:300]}") from error
    return layer
