"""Converts one decoder layer: adds a router and a shared head to the mapped tensors, and builds W_O as planned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from query_experts.convert.calibration import Fit, contributions, fit_router, importance, rank_shares
from query_experts.convert.weight_map import O_PROJ, with_extra_slots
from query_experts.layers.router import select_top_k
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.initialization import named_generator
from query_experts.ops.select import row_numbers

ROUTERS = ("random", "query_norm", "calibrated", "none")
Q_PROJ, ROUTER, Q_SHARED = "self_attn.q_proj", "self_attn.router.weight", "self_attn.q_shared"


@dataclass(frozen=True)
class Plan:
    """How to convert a dense model.

    Attributes:
        model_type: the dense model's.
        full: configuration by `expert` with all query heads, which the weight map leads to.
        final: configuration of the converted model.
        router: how the router starts. `random`: small normal numbers. `query_norm`: fitted to the norms of the heads'
            queries (after MoH, arXiv 2410.11842, which uses these norms as the router). `calibrated`: fitted to the
            heads' contributions to the layer's output. `none`: no router; the k most important heads of each group
            are always active. This is the control.
        seed: of the random numbers.
    """

    model_type: str
    full: GQEConfig
    final: GQEConfig
    router: str
    seed: int

    @property
    def needs_text(self) -> bool:
        return self.router != "random"

    @property
    def fitted_top_k(self) -> int:
        """The k that the fit is judged by; 1 if all experts stay active."""
        experts = self.full.num_attention_heads // self.full.num_key_value_heads
        return self.final.active_query_experts if self.final.active_query_experts < experts else 1


@dataclass(frozen=True)
class LayerActivations:
    """What one dense layer computes on text: normed input [R, D], heads' outputs [R, N, d], held-out rows bool [R]."""

    x: Tensor
    heads: Tensor
    held_out: Tensor


def convert_layer(
    tensors: dict[str, Tensor], plan: Plan, prefix: str, activations: LayerActivations | None
) -> tuple[dict[str, Tensor], Fit | None]:
    """A layer as the weight map gives it -> the layer as planned, and the router's fit.

    tensors: by their names within the layer; changed in place. prefix: text before these names in the model.
    activations: of the dense layer; needed unless the router is `random`.
    """
    if plan.router == "none":
        assert activations is not None
        strength = head_strength(activations, tensors, plan)[~activations.held_out]
        return add_shared_head(keep_heads(tensors, importance(strength), plan), plan, prefix), None
    fit = None
    if plan.router == "random":
        router = random_rows(plan, prefix + ROUTER, plan.full.num_attention_heads)
        tensors[ROUTER] = router.to(tensors[O_PROJ].device)
    else:
        assert activations is not None
        strength = head_strength(activations, tensors, plan)
        groups = plan.full.num_key_value_heads
        fit = fit_router(activations.x, strength, groups, plan.fitted_top_k, activations.held_out)
        tensors[ROUTER] = fit.weight
    if plan.final.output_projection == "slot":
        tensors[O_PROJ] = slot_output_projection(tensors, plan, activations)
    tensors[ROUTER] = tensors[ROUTER].to(tensors[O_PROJ])
    return add_shared_head(tensors, plan, prefix), fit


def head_strength(activations: LayerActivations, tensors: dict[str, Tensor], plan: Plan) -> Tensor:
    """How strong each head is for each token, float32 [R, N]: its query's norm or its contribution, by the router."""
    config = plan.full
    if plan.router != "query_norm":
        width = config.num_attention_heads * config.head_dim
        return contributions(activations.heads, tensors[O_PROJ][:, :width])
    x, weight, bias = activations.x, tensors[f"{Q_PROJ}.weight"], tensors.get(f"{Q_PROJ}.bias")
    query = F.linear(x, weight.to(x), bias if bias is None else bias.to(x)).float()
    query = query.unflatten(-1, (config.num_attention_heads, config.head_dim))
    if config.qk_norm:  # then the norm's weights decide a query's length
        query = F.rms_norm(query, (config.head_dim,), tensors["self_attn.q_norm.weight"].float(), config.rms_norm_eps)
    return query.norm(dim=-1)


def keep_heads(tensors: dict[str, Tensor], score: Tensor, plan: Plan) -> dict[str, Tensor]:
    """The layer with only the k heads of the highest scores [N] in each group, in their order."""
    config, k = plan.full, plan.final.active_query_experts
    groups, d = config.num_key_value_heads, config.head_dim
    kept = select_top_k(score.view(groups, -1), k).sort(-1).values  # [G, k]
    heads = row_numbers(kept, config.num_attention_heads // groups)
    for name in (f"{Q_PROJ}.weight", f"{Q_PROJ}.bias"):
        if name in tensors:
            tensors[name] = tensors[name].unflatten(0, (-1, d))[heads].flatten(0, 1)
    width = config.num_attention_heads * d
    columns = tensors[O_PROJ][:, :width].unflatten(1, (-1, d))[:, heads].flatten(1)
    tensors[O_PROJ] = with_extra_slots(columns, plan.final)
    return tensors


def slot_output_projection(tensors: dict[str, Tensor], plan: Plan, activations: LayerActivations | None) -> Tensor:
    """W_O by slot, [D, (k*G + 2)*d]: each slot's columns are a mean of the columns of its group's experts.

    With activations, an expert's weight in the mean is how often it has the slot's rank; without, all are equal.
    """
    config, k = plan.full, plan.final.active_query_experts
    groups, d = config.num_key_value_heads, config.head_dim
    experts = config.num_attention_heads // groups
    columns = tensors[O_PROJ][:, : config.num_attention_heads * d].view(-1, groups, experts, d)
    shares = torch.full((groups, k, experts), 1 / experts, device=columns.device)
    if activations is not None:
        shares = rank_shares(F.linear(activations.x.float(), tensors[ROUTER].float()), groups, k)
    slots = torch.einsum("gkm,Dgmd->Dgkd", shares.to(columns.device, torch.float32), columns.float())
    return with_extra_slots(slots.flatten(1).to(columns.dtype), plan.final)


def add_shared_head(tensors: dict[str, Tensor], plan: Plan, prefix: str) -> dict[str, Tensor]:
    """The layer with a random shared head, if the variant has one; it has no effect yet, as its slot in W_O is zero."""
    if plan.final.variant == "gqe":
        q_proj = tensors[f"{Q_PROJ}.weight"]
        tensors[f"{Q_SHARED}.weight"] = random_rows(plan, f"{prefix}{Q_SHARED}.weight", plan.full.head_dim).to(q_proj)
        if plan.final.attention_bias:
            tensors[f"{Q_SHARED}.bias"] = q_proj.new_zeros(plan.full.head_dim)
    return tensors


def random_rows(plan: Plan, name: str, num_rows: int) -> Tensor:
    """Small normal numbers, float32 [num_rows, D], that depend on the plan's seed and the tensor's name."""
    numbers = torch.randn(num_rows, plan.full.hidden_size, generator=named_generator(plan.seed, name))
    return numbers * plan.full.initializer_range
