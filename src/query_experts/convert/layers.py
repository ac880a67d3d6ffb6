"""Converting one decoder layer: the dense tensors through the map, then router, shared head and W_O as asked for."""

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
Q_PROJ, ROUTER, SHARED = "self_attn.q_proj", "self_attn.router.weight", "self_attn.q_shared"


@dataclass(frozen=True)
class Plan:
    """What to make of a dense model.

    full: by `expert`, with all its query heads: what the map of names leads to. final: what is wanted.
    router: `random`, small normal numbers; `query_norm`, fitted to the norms of the heads' queries (after MoH, arXiv
        2410.11842, which takes those norms for a router); `calibrated`, fitted to the heads' contributions to the
        layer's output; `none`, the k most important heads of each group always on and no router: the control.
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
        """The k that the fit is judged by: where all experts stay on, that of the sparsest model."""
        experts = self.full.num_attention_heads // self.full.num_key_value_heads
        return self.final.active_query_experts if self.final.active_query_experts < experts else 1


@dataclass(frozen=True)
class Observed:
    """One dense layer at work: normed input [R, D], outputs of its heads [R, N, d], and which rows judge, bool [R]."""

    x: Tensor
    heads: Tensor
    held_out: Tensor


def convert_layer(
    ours: dict[str, Tensor], plan: Plan, where: str, observed: Observed | None
) -> tuple[dict[str, Tensor], Fit | None]:
    """A layer as the map of names gives it -> as the plan has it, and how the router's fit came out.

    where: what stands before the layer's names. observed: the dense layer at work, which all but `random` need.
    """
    if plan.router == "none":
        assert observed is not None
        strength = strength_of(observed, ours, plan)[~observed.held_out]
        return with_new_shared_head(keep_heads(ours, importance(strength), plan), plan, where), None
    fit = None
    if plan.router == "random":
        ours[ROUTER] = drawn(plan, where + ROUTER, plan.full.num_attention_heads).to(ours[O_PROJ].device)
    else:
        assert observed is not None
        strength = strength_of(observed, ours, plan)
        fit = fit_router(observed.x, strength, plan.full.num_key_value_heads, plan.fitted_top_k, observed.held_out)
        ours[ROUTER] = fit.weight
    if plan.final.output_projection == "slot":
        ours[O_PROJ] = by_slot(ours, plan, observed)
    ours[ROUTER] = ours[ROUTER].to(ours[O_PROJ])
    return with_new_shared_head(ours, plan, where), fit


def strength_of(observed: Observed, ours: dict[str, Tensor], plan: Plan) -> Tensor:
    """How strong each head is for each token, float32 [R, N]."""
    config = plan.full
    if plan.router != "query_norm":
        width = config.num_attention_heads * config.head_dim
        return contributions(observed.heads, ours[O_PROJ][:, :width])
    weight, bias = ours[f"{Q_PROJ}.weight"], ours.get(f"{Q_PROJ}.bias")
    query = F.linear(observed.x, weight.to(observed.x), bias if bias is None else bias.to(observed.x)).float()
    query = query.unflatten(-1, (config.num_attention_heads, config.head_dim))
    if config.qk_norm:  # normed, a query's length is that of the norm's weights in its direction
        query = F.rms_norm(query, (config.head_dim,), ours["self_attn.q_norm.weight"].float(), config.rms_norm_eps)
    return query.norm(dim=-1)


def keep_heads(ours: dict[str, Tensor], score: Tensor, plan: Plan) -> dict[str, Tensor]:
    """The layer with the k heads of the highest score [N] in each group alone, in their order."""
    config, k = plan.full, plan.final.active_query_experts
    groups, d = config.num_key_value_heads, config.head_dim
    kept = select_top_k(score.view(groups, -1), k).sort(-1).values  # [G, k]
    heads = row_numbers(kept, config.num_attention_heads // groups)
    for name in (f"{Q_PROJ}.weight", f"{Q_PROJ}.bias"):
        if name in ours:
            ours[name] = ours[name].unflatten(0, (-1, d))[heads].flatten(0, 1)
    width = config.num_attention_heads * d
    columns = ours[O_PROJ][:, :width].unflatten(1, (-1, d))[:, heads].flatten(1)
    ours[O_PROJ] = with_extra_slots(columns, plan.final)
    return ours


def by_slot(ours: dict[str, Tensor], plan: Plan, observed: Observed | None) -> Tensor:
    """W_O [D, (k*G + 2)*d] by slot: each slot's columns are the mean of its group's experts'.

    Weighted by how often an expert comes at that rank, where that was observed; else all alike.
    """
    config, k = plan.full, plan.final.active_query_experts
    groups, d = config.num_key_value_heads, config.head_dim
    experts = config.num_attention_heads // groups
    columns = ours[O_PROJ][:, : config.num_attention_heads * d].view(-1, groups, experts, d)
    shares = torch.full((groups, k, experts), 1 / experts, device=columns.device)
    if observed is not None:
        shares = rank_shares(F.linear(observed.x.float(), ours[ROUTER].float()), groups, k)
    slots = torch.einsum("gkm,Dgmd->Dgkd", shares.to(columns.device, torch.float32), columns.float())
    return with_extra_slots(slots.flatten(1).to(columns.dtype), plan.final)


def with_new_shared_head(ours: dict[str, Tensor], plan: Plan, where: str) -> dict[str, Tensor]:
    """The layer with a shared head drawn at random; its slot in W_O is zero, so it changes nothing yet."""
    if plan.final.variant == "gqe":
        like = ours[f"{Q_PROJ}.weight"]
        ours[f"{SHARED}.weight"] = drawn(plan, f"{where}{SHARED}.weight", plan.full.head_dim).to(like)
        if plan.final.attention_bias:
            ours[f"{SHARED}.bias"] = like.new_zeros(plan.full.head_dim)
    return ours


def drawn(plan: Plan, name: str, rows: int) -> Tensor:
    """Small normal numbers [rows, D], float32, by the plan's seed and the tensor's name."""
    numbers = torch.randn(rows, plan.full.hidden_size, generator=named_generator(plan.seed, name))
    return numbers * plan.full.initializer_range
