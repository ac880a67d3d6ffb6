"""What is watched of the routers: how evenly experts are loaded, how sure routers are, how much selections change.

Where NeMo Automodel or OLMo-core has a name for a value, it is that name, with that definition. A group of a GQE layer
is what a layer is there.

Shapes: L layers, R tokens, G groups, M experts in a group, k selected experts in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from query_experts.layers.attention import GQEAttention
from query_experts.layers.balance import DEAD_BELOW, relative_entropy, selected_experts
from query_experts.model.heads import GQEForSequenceClassification
from query_experts.model.modeling_gqe import GQEForCausalLM

PREFIX = "moe"


@dataclass(frozen=True)
class ProbedRouting:
    """Routing of fixed tokens.

    Attributes:
        entropy: [L, G], of the router over log M, mean over tokens.
        top_prob: [L, G], the largest probability, mean over tokens.
        selected: bool [L, R, G, M], the selected experts.
    """

    entropy: Tensor
    top_prob: Tensor
    selected: Tensor


def routed_layers(model: nn.Module) -> list[GQEAttention]:
    """The attention layers that have a router, in their order."""
    return [module for module in model.modules() if isinstance(module, GQEAttention) and module.router is not None]


@torch.no_grad()
def probe(model: nn.Module, layers: Sequence[GQEAttention], inputs: dict[str, Any]) -> ProbedRouting:
    """Routes tokens by a model in evaluation mode, without gradients and uncompiled.

    Args:
        model: A GQE model, or one that is wrapped.
        layers: Its `routed_layers`.
        inputs: `input_ids` [B, T], and `attention_mask` where some tokens are padding.

    Returns:
        The routing of the real tokens, on the CPU.
    """
    training = model.training
    model.eval()
    try:
        router_logits = _router_logits(model, inputs)
    finally:
        model.train(training)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().ne(0)
    entropies, top_probs, selected = [], [], []
    for layer, logits in zip(layers, router_logits, strict=True):
        grouped = logits[real.to(logits.device)].unflatten(-1, (-1, layer.experts_per_group))  # [R, G, M]
        entropies.append(relative_entropy(grouped).mean(0).cpu())
        top_probs.append(grouped.softmax(-1).amax(-1).mean(0).cpu())
        selected.append(selected_experts(grouped, layer.top_k).bool().cpu())
    return ProbedRouting(torch.stack(entropies), torch.stack(top_probs), torch.stack(selected))


def _router_logits(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits of each layer, [B*T, N]. A head that takes only one row at a time gets them so."""
    last_logits = {"logits_to_keep": 1} if any(isinstance(m, GQEForCausalLM) for m in model.modules()) else {}
    by_row = any(isinstance(m, GQEForSequenceClassification) and m.config.pad_token_id is None for m in model.modules())
    count = len(inputs["input_ids"])
    parts = [slice(row, row + 1) for row in range(count)] if by_row else [slice(None)]
    with torch.compiler.set_stance("force_eager"):
        outputs = [
            model(
                **{name: value[part] for name, value in inputs.items()},
                output_router_logits=True, use_cache=False, **last_logits,
            )
            for part in parts
        ]  # fmt: skip
    return [torch.cat(of_layer) for of_layer in zip(*(output["router_logits"] for output in outputs), strict=True)]


def churn(before: Tensor, now: Tensor) -> Tensor:
    """Share of tokens whose selected set has changed: bool [L, R, G, M] twice -> [L, G]."""
    return (before != now).any(-1).double().mean(1)


def load_values(load: Tensor, top_k: Tensor) -> dict[str, Tensor]:
    """Name -> values, from the load [L, G, M], the share of tokens that selected each expert, and k of each layer [L].

    By expert [L, G, M]: `load`; `expert_utilization`, over the ideal load k / M. By group [L, G]: `cv`, the sample
    standard deviation over the mean; `load_imbalance`, the largest over the mean; `dead_expert_frac`, the share of
    experts with a load below 1%; `expert_diversity`, exp of the load's entropy over M.
    """
    load = load.double()
    num_experts = load.shape[-1]
    mean = load.mean(-1)
    share = load / load.sum(-1, keepdim=True)
    return {
        "load": load,
        "expert_utilization": load * num_experts / top_k[:, None, None],
        "cv": load.std(-1) / mean if num_experts > 1 else torch.zeros_like(mean),
        "load_imbalance": load.amax(-1) / mean,
        "dead_expert_frac": (load < DEAD_BELOW).double().mean(-1),
        "expert_diversity": (-torch.xlogy(share, share).sum(-1)).exp() / num_experts,
    }


def summary(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean and extremes of each value over layers, groups and experts, as `moe/NAME_mean`, `_min` and `_max`."""
    found = {}
    for name, value in values.items():
        for kind, number in (("mean", value.mean()), ("min", value.min()), ("max", value.max())):
            found[f"{PREFIX}/{name}_{kind}"] = as_float(number)
    return found


def details(values: dict[str, Tensor]) -> dict[str, float]:
    """Each value of each group, as `moe/layer_0/group_0/NAME`, and of each expert with `_expert_0` after it."""
    found = {}
    for name, value in values.items():
        for layer, of_layer in enumerate(value):
            for group, of_group in enumerate(of_layer):
                place = f"{PREFIX}/layer_{layer}/group_{group}/{name}"
                if of_group.ndim == 0:
                    found[place] = as_float(of_group)
                else:
                    found |= {f"{place}_expert_{m}": as_float(number) for m, number in enumerate(of_group)}
    return found


def as_float(number: Tensor) -> float:
    """A Python float of six digits after the point, which keeps a run's log short."""
    return round(float(number), 6)
