"""Grouped Query Experts attention (arXiv 2606.20945), from top to bottom: route, select, attend, combine.

The query heads of grouped-query attention are experts. In each of the G groups a router selects, for every token, k of
the M heads. All G key/value heads stay on, so the KV cache is exactly that of grouped-query attention. After the
selection nothing is sparse: the selected queries are an ordinary tensor of G*k heads, and any causal kernel attends
with them. Which implementation of a step runs is chosen in `ops/`.

Shapes: B batch, T new tokens, S keys (cached and new), D hidden size, G groups (= KV heads), M experts in a group,
k selected experts in a group, N = G*M query experts, d head dim.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from query_experts.layers.balance import balance_loss, routing_statistics
from query_experts.layers.caches import check_writer
from query_experts.layers.masks import attention_backend, causal_mask
from query_experts.layers.one_product import in_one_product
from query_experts.layers.router import Router, select_top_k
from query_experts.layers.validation import (
    check_inputs,
    check_layout,
    check_numbers,
    check_switches,
    default_head_dim,
    is_whole,
)
from query_experts.ops import select
from query_experts.ops.attend import CausalKernel, attend, uses_shared_decode
from query_experts.ops.combine import weighted_slot
from query_experts.ops.dtypes import wide
from query_experts.ops.kernels import Kernels, check_kernels, described, no_triton, not_covered, uses_triton
from query_experts.ops.rotate import rotary_cos_sin, rotate
from query_experts.ops.select import scatter_experts, select_experts, selected_queries

COPIED_TOKENS = 1024  # from which a copy of the queries should cost little beside attention (not measured)


@dataclass(frozen=True)
class Routing:
    """What the router decided for one forward pass.

    Attributes:
        logits: [B, T, G, M], float32 (float64 in float64); None where `routing="none"`.
        indices: [B, T, G, k], int64, the selected experts, most probable first.
        num_experts: M.
        dtype: of the probabilities, as of the logits.
        balance_loss: scalar, over the tokens that attention_mask keeps; None inside a model, which computes its own.
    """

    logits: Tensor | None
    indices: Tensor
    num_experts: int
    dtype: torch.dtype
    balance_loss: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """[B, T, G, M], softmax over a group's experts; uniform without a router."""
        if self.logits is not None:
            return self.logits.softmax(-1)
        shape, M = self.indices.shape[:-1], self.num_experts
        return torch.full((*shape, M), 1 / M, dtype=self.dtype, device=self.indices.device)

    @property
    def scores(self) -> Tensor:
        """Probabilities of the selected experts, [B, T, G, k]."""
        return self.probs.gather(-1, self.indices)

    @property
    def log_scores(self) -> Tensor | None:
        """Their logarithms, which no probability's underflow makes -inf; None where all are the same."""
        return self.logits.log_softmax(-1).gather(-1, self.indices) if self.logits is not None else None


class GQEAttention(nn.Module):
    """Causal self-attention whose query heads are experts, for any PyTorch model (arXiv 2606.20945, section 3).

    Args:
        hidden_size: D, the width of the model.
        num_query_experts: N, the query heads of all groups together.
        num_kv_heads: G, the groups.
        top_k: k, the experts that a token selects in each group.
        head_dim: d; by default D / N.
        variant: `gqe`, the paper's layer; `hard_concat`, its ablation with only the hard slots; `weighted_concat`, its
            ablation with slots scaled by their probability, no weighted slot and no shared head (Table 2).
        output_projection: `slot`, the paper's: W_O rows belong to the rank of a selected expert. `expert`: they belong
            to the expert. Then k = M with the two extra slots zero or absent is dense grouped-query attention, and a
            dense checkpoint converts exactly.
        rope_theta: base of the rotary embedding; None for no rotary embedding.
        bias: whether the q, k, v, o and shared-query projections have a bias; the router never has one.
        layer_idx: this layer's index in the Transformers `Cache`.
        routing: `learned`; `frozen`, a random router that never trains, which separates routing from having more query
            parameters; `none`, no router and all experts in index order: the always-on control that isolates the
            effect of routing.
        shared_head_kv: `mean` over all groups' key and value heads, as in the reference layer; `first`, the first
            group's: no mean and no copy, and a paged cache serves it as it is.
        output_bias: whether o_proj has a bias; None for the same as `bias` (Qwen2 has biases on all but o_proj).
        qk_norm: RMSNorm over the head dim of queries (the shared head's too) and keys, before the rotary embedding,
            as in Qwen3.
        norm_eps: eps of that norm.
        dropout: on the attention weights, in training.
        attn_implementation: `sdpa`, `eager` or `flex_attention`, or another backend of Transformers.
        device: of the weights, as in `nn.Linear`; `meta` for none yet (then `to_empty` and `reset_parameters`).
        dtype: of the weights.
        kernels: `torch`, the plain path, on any device; `triton`, fused kernels for NVIDIA GPUs; `auto`, the latter
            only on GPUs for which they were measured. Not a part of a checkpoint; `set_kernels` changes it.

    Attributes:
        forced_indices: experts [B, T, G, k] to select in place of the router's choice; see `replay`.

    Raises:
        ValueError: for a layout that can't be built, and for kernels that can't run in this installation.
    """

    kernels: Kernels = "auto"
    forced_indices: Tensor | None = None
    is_group_parallel = False  # whether a rank has only some of the groups (model/tensor_parallel.py)
    hidden_size: int | None = None  # of a layer that an older version pickled

    def __init__(
        self,
        hidden_size: int,
        num_query_experts: int,
        num_kv_heads: int,
        top_k: int = 1,
        head_dim: int | None = None,
        variant: str = "gqe",
        output_projection: str = "slot",
        rope_theta: float | None = None,
        bias: bool = False,
        layer_idx: int = 0,
        *,
        routing: str = "learned",
        shared_head_kv: str = "mean",
        output_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attn_implementation: str = "sdpa",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: Kernels = "auto",
        _config: Any = None,
    ):
        super().__init__()
        if head_dim is None:
            head_dim = default_head_dim(hidden_size, num_query_experts)
        check_layout(
            hidden_size, num_query_experts, num_kv_heads, top_k, head_dim, rope_theta is not None,
            variant, output_projection, routing, shared_head_kv,
        )  # fmt: skip
        check_numbers(rope_theta, dropout, norm_eps, layer_idx)
        output_bias = bias if output_bias is None else output_bias
        check_switches(bias=bias, output_bias=output_bias, qk_norm=qk_norm)
        num_query_experts, num_kv_heads, top_k, head_dim = map(int, (num_query_experts, num_kv_heads, top_k, head_dim))
        self.hidden_size = int(hidden_size)
        self.num_query_experts = num_query_experts
        self.num_kv_heads = num_kv_heads
        self.experts_per_group = num_query_experts // num_kv_heads
        self.top_k = top_k
        self.head_dim = head_dim
        self.variant = variant
        self.output_projection = output_projection
        self.rope_theta = rope_theta
        self.layer_idx = layer_idx
        self.routing = routing
        self.shared_head_kv = shared_head_kv
        self.dropout = dropout
        self.scaling = head_dim**-0.5
        self.config = _config if _config is not None else attention_backend(attn_implementation)

        extra_slots = 2 if variant == "gqe" else 0
        hard_slots = num_kv_heads * top_k if output_projection == "slot" else num_query_experts
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_query_experts * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **factory)
        self.o_proj = nn.Linear((hard_slots + extra_slots) * head_dim, hidden_size, bias=output_bias, **factory)
        self.router = None
        if routing != "none":
            self.router = Router(hidden_size, num_query_experts, routing == "learned", **factory)
        self.q_shared = nn.Linear(hidden_size, head_dim, bias=bias, **factory) if variant == "gqe" else None
        self.q_norm = LlamaRMSNorm(head_dim, eps=norm_eps).to(**factory) if qk_norm else None
        self.k_norm = LlamaRMSNorm(head_dim, eps=norm_eps).to(**factory) if qk_norm else None
        self.routed_heads = CausalKernel(self.config, top_k, layer_idx)
        self.shared_head = CausalKernel(self.config, 1, layer_idx) if variant == "gqe" else None
        self.set_kernels(kernels)
        self._warn_if_router_gets_no_gradient()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as a new layer draws them; a frozen router's too."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.router, self.q_shared):
            if part is not None:
                part.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def set_top_k(self, top_k: int) -> None:
        """Selects another number of experts in each group from now on.

        Raises:
            ValueError: where W_O's rows belong to slots, whose number would change, or where there is no router.
        """
        if top_k != self.top_k and (self.output_projection != "expert" or self.router is None):
            raise ValueError(
                f"output_projection is {self.output_projection!r} and routing {self.routing!r}; to change top_k, they "
                "must be 'expert' and have a router"
            )
        if not is_whole(top_k) or not 1 <= top_k <= self.experts_per_group:
            raise ValueError(f"top_k is {top_k!r}; it must be 1 to {self.experts_per_group}, the experts in a group")
        self.top_k = self.routed_heads.num_key_value_groups = top_k

    def set_kernels(self, kernels: Kernels) -> None:
        """Runs the layer by `torch`, `triton` or `auto` kernels from now on.

        Raises:
            ValueError: for another name, and for `triton` where this installation or the layout can't have it. What
                depends on the device and the input is checked when the layer is called.
        """
        if check_kernels(kernels) == "triton" and (reason := no_triton() or not_covered(self)):
            raise ValueError(f"kernels is 'triton', which {reason}; kernels='torch' runs here")
        self.kernels = kernels

    def _refuse_fused_decode(self, value: bool) -> None:
        raise AttributeError(f"fused_decode is {value}; it has become kernels='triton' (or 'torch'), by set_kernels")

    fused_decode = property(None, _refuse_fused_decode)

    def _warn_if_router_gets_no_gradient(self) -> None:
        reason = None
        if self.experts_per_group == 1:
            reason = "each group has one expert (M = 1)"
        elif self.variant == "hard_concat":
            reason = "variant is 'hard_concat', which leaves the outputs unscaled"
        elif self.variant == "gqe" and self.num_kv_heads == 1 and self.top_k == 1:
            reason = "with one group and top-k 1 the renormalised weight is always 1 (G = 1, k = 1)"
        if reason and self.routing == "learned":
            warnings.warn(
                f"the router gets no gradient from the language-model loss: {reason}", UserWarning, stacklevel=3
            )

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Attends causally.

        Args:
            x: hidden states [B, T, D], any float dtype.
            attention_mask: [B, S], integers or bool, nonzero for real tokens; causality holds in addition.
            position_ids: [B or 1, T]; by default they continue from the cached tokens. Where they restart, a new
                document begins that doesn't see the one before.
            past_key_values: a Transformers cache (dynamic or static), for any number of new tokens.
            output_routing: also return the routing.

        Returns:
            y [B, T, D], or (y, `Routing`).

        Raises:
            ValueError: for an argument of another type or shape, an x of integers, a cache in which another layer
                wrote to this `layer_idx`, and kernels that can't run here.
        """
        check_inputs(self.hidden_size, self.layer_idx, x, attention_mask, position_ids, past_key_values)
        mask = causal_mask(
            self.config, x, attention_mask, past_key_values, position_ids,
            materialise=uses_shared_decode(self, x.shape[1], past_key_values), layer_idx=self.layer_idx,
        )  # fmt: skip
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        new = torch.arange(x.shape[1], device=x.device) + past  # before the cache is updated
        cos_sin = None
        if self.rope_theta is not None:
            cos_sin = rotary_cos_sin(
                position_ids if position_ids is not None else new[None], self.head_dim, self.rope_theta, x.dtype
            )
        y, _, routing = self.route_and_attend(x, mask, cos_sin, past_key_values, position_ids=position_ids)
        if not output_routing:
            return y
        token_mask = attention_mask[:, new] if attention_mask is not None else None
        return y, replace(routing, balance_loss=self._balance_loss(routing, token_mask))

    def route_and_attend(
        self, x: Tensor, mask: Any, cos_sin: tuple[Tensor, Tensor] | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """The method, step by step (section 3), given a mask from `causal_mask`.

        Returns:
            y [B, T, D], attention weights [B, heads, T, S] or None, and the routing.
        """
        if uses_triton(self, x, cos_sin):  # the same steps by fewer kernels
            from query_experts.layers.fused import fused_attention  # needs triton

            y, weights, logits, indices = fused_attention(self, x, mask, cos_sin, past_key_values, **kwargs)
            return y, weights, self.routing_of(x, logits, indices)

        # Route: p_g = softmax(r_g x) over the M experts of each group; K_g = the k largest, found by their logits.
        routing = self.route(x)

        # Select: queries only of the experts in K_g and of the shared head; keys and values of every group.
        heads, value = self.project(x, routing, past_key_values)  # queries, then keys [B, T, heads, d]; values
        heads = rotate(heads, cos_sin)
        query, key = self.queries_and_keys(heads)
        key, value = self.update_caches(key, value.transpose(1, 2), past_key_values, kwargs)  # [B, G, S, d]
        if past_key_values is not None and x.shape[1] >= COPIED_TOKENS and not torch.is_grad_enabled():
            query = query.contiguous()  # the cache has the keys; theirs and the queries' joined memory is freed
            del heads

        # Attend, causally: o_{g,m}, each selected expert over its group's K/V; s, the shared head over their mean.
        routed, shared, weights = attend(self, query, key, value, mask, past_key_values, **kwargs)
        del query, key, value  # their memory is free for what follows

        # Combine: y = [hard slots o_{g,m} ; weighted slot sum_g sum_m w_{g,m} o_{g,m} ; shared head s] W_O.
        return self.o_proj(self.combine(routed, shared, routing)), weights, routing

    def route(self, x: Tensor) -> Routing:
        """x [B, T, D] -> logits [B, T, G, M] and selected experts [B, T, G, k]: top-k by the logits."""
        if self.router is None:
            return self.routing_of(x, None, None)
        logits = self.router(x)
        logits = logits.view(*x.shape[:2], logits.shape[-1] // self.experts_per_group, self.experts_per_group)
        indices = self.forced_indices
        if indices is None:
            indices = select_top_k(logits.detach(), self.top_k)
        return self.routing_of(x, logits, indices)

    def routing_of(self, x: Tensor, logits: Tensor | None, indices: Tensor | None) -> Routing:
        """The routing of x [B, T, D]. Without indices, all experts of each group in their order, [B, T, G, M]."""
        if indices is None:
            experts = torch.arange(self.experts_per_group, device=x.device)
            indices = experts.expand(*x.shape[:2], self.num_kv_heads, -1)
        return Routing(logits, indices, self.experts_per_group, wide(x.dtype))

    def project(self, x: Tensor, routing: Routing, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> heads to rotate and to attend with, and values of all groups [B, T, G, d].

        The heads are one tensor [B, T, G*k (+1) + G, d]: queries of the selected experts, of the shared head if any,
        and keys of all groups, normalised where the layer has norms.
        """
        rows = None
        if not select.reads_selected_rows(self.q_proj, x, routing.indices, self.experts_per_group):
            modules = [self.q_proj, self.q_shared, self.k_proj, self.v_proj]
            rows = in_one_product(self, self.layer_idx, [m for m in modules if m is not None], x, past_key_values)
        if rows is None:
            queries = self.project_queries(x, routing)
            key, value = self.project_keys_values(x)
        else:
            queries, key, value = self._split_product(rows, routing)
        queries, key = self.normalise(queries, key)
        return torch.cat([*queries, key], 2), value

    def normalise(self, queries: list[Tensor], key: Tensor) -> tuple[list[Tensor], Tensor]:
        """QK norm of queries and keys [B, T, heads, d], where the layer has it."""
        if self.q_norm is None or self.k_norm is None:
            return queries, key
        return [self.q_norm(torch.cat(queries, 2))], self.k_norm(key)

    def _split_product(self, rows: Tensor, routing: Routing) -> tuple[list[Tensor], Tensor, Tensor]:
        """The rows of q_proj, q_shared, k_proj and v_proj -> as `project_queries` and `project_keys_values`."""
        G = self.num_kv_heads
        shared = 0 if self.q_shared is None else 1
        heads = rows.unflatten(-1, (-1, self.head_dim))
        query, *queries, key, value = heads.split([self.num_query_experts, *[1] * shared, G, G], 2)
        if self.router is not None:
            query = select_experts(query.unflatten(2, (G, -1)), routing.indices).flatten(2, 3)
        return [query, *queries], key, value

    def queries_and_keys(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Heads as `project` joins them -> queries [B, G*k (+1), T, d] and keys [B, G, T, d]."""
        query, key = heads.transpose(1, 2).split([heads.shape[2] - self.num_kv_heads, self.num_kv_heads], 1)
        return query, key

    def project_queries(self, x: Tensor, routing: Routing) -> list[Tensor]:
        """x [B, T, D] -> queries of the selected experts [B, T, G*k, d], and of the shared head if any [B, T, 1, d]."""
        if self.router is None:
            query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, N, d]
        else:
            query = selected_queries(self.q_proj, x, routing.indices, self.experts_per_group).flatten(2, 3)
        return [query] if self.q_shared is None else [query, self.q_shared(x).unsqueeze(2)]

    def project_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> keys and values of all groups, [B, T, G, d]."""
        heads = (-1, self.head_dim)
        return self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)

    def shared_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, S, d] -> the one head [B, 1, S, d] of each that the shared head reads."""
        if self.shared_head_kv == "mean":
            return key.mean(1, keepdim=True), value.mean(1, keepdim=True)
        return key[:, :1], value[:, :1]

    def combine(self, routed: Tensor, shared: Tensor | None, routing: Routing) -> Tensor:
        """The rows that W_O takes: hard slots, weighted slot, shared head.

        routed [B, T, G, k, d], shared [B, T, d] or None -> [B, T, (G*k or N, + 2) * d].
        """
        extra = []
        if self.variant == "gqe":
            assert shared is not None
            extra = [weighted_slot(routed, routing.log_scores), shared]
        elif self.variant == "weighted_concat":
            routed = routed * routing.scores.to(routed.dtype)[..., None]
        if self.output_projection == "expert" and self.router is not None:
            routed = scatter_experts(routed, routing.indices, self.experts_per_group)  # [B, T, G, M, d]
        return torch.cat([routed.flatten(2), *extra], -1)

    def update_caches(
        self, key: Tensor, value: Tensor, past_key_values: Cache | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, G, T, d] to the caches that there are, and returns those to attend to."""
        if past_key_values is not None:
            check_writer(past_key_values, self.layer_idx, self)
            key, value = past_key_values.update(key, value, self.layer_idx)
        if kwargs.get("cache") is not None:
            key, value = self._update_paged_cache(key, value, kwargs)
        return key, value

    def _update_paged_cache(self, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Updates continuous batching's cache here where there is a shared head: a kernel would do it in each call."""
        if self.shared_head is None:
            return key, value
        key, value = kwargs.pop("cache").update(
            key_states=key, value_states=value, layer_idx=self.layer_idx, kwargs=kwargs
        )
        if kwargs.get("block_table") is not None:
            raise ValueError("continuous batching decodes from a block table, which can't serve the shared head")
        return key, value

    def _balance_loss(self, routing: Routing, token_mask: Tensor | None) -> Tensor:
        if routing.logits is None:
            return torch.zeros((), dtype=routing.dtype, device=routing.indices.device)
        logits = routing.logits.flatten(0, 1).flatten(1)
        statistics = routing_statistics((logits,), self.num_kv_heads, self.top_k, token_mask)
        tokens = statistics.tokens.clamp(min=1)
        return balance_loss(statistics.selected / tokens, statistics.prob_sum / tokens)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_query_experts}, kv_heads={self.num_kv_heads}, top_k={self.top_k}, "
            f"variant={self.variant}, output_projection={self.output_projection}, routing={self.routing}, "
            f"kernels={described(self.kernels, next(self.parameters()).device)}"
        )
