"""Grouped Query Experts attention (arXiv 2606.20945), top to bottom: route, select, attend, combine.

The query heads of grouped-query attention are experts. In each of the G groups a router wakes, for every token, k of
the M heads; all G key/value heads stay on, so the KV cache is exactly that of grouped-query attention. After the
selection nothing sparse is left: the woken queries are an ordinary tensor of G*k heads, and any causal kernel
attends with them.

Shapes: B batch, T new tokens, S keys (cached and new), D hidden size, G groups (= KV heads), M experts in a group,
k experts woken in a group, N = G*M query experts, d head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
    rotate_half,
)
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from query_experts.layers.balance import balance_loss, routing_statistics
from query_experts.layers.masks import AttentionBackend, causal_mask
from query_experts.layers.router import Router, select_top_k
from query_experts.layers.validation import check_layout
from query_experts.ops.select import row_numbers, scatter_experts, select_experts
from query_experts.ops.shared_decode import shared_decode

SPARSE_FROM = 8  # experts for each woken one
DECODE_TOKENS = 8  # up to so many new tokens, forming all their scores costs less than a mean over the cache


@dataclass(frozen=True)
class Routing:
    """What the router decided for one forward pass."""

    logits: Tensor | None  # [B, T, G, M], float32 (float64 in float64); None where routing="none"
    probs: Tensor  # [B, T, G, M], softmax over a group's experts, dtype as the logits
    indices: Tensor  # [B, T, G, k], int64, the woken experts, most probable first
    balance_loss: Tensor | None = None  # scalar, over the tokens that attention_mask keeps

    @property
    def scores(self) -> Tensor:
        """Probabilities of the woken experts, [B, T, G, k]."""
        return self.probs.gather(-1, self.indices)


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, d] of Llama's half-rotation form; angles in float32 whatever the dtype, as Llama has them."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponents)  # [B, T, d/2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class CausalKernel(nn.Module):
    """One call of Transformers' attention interface: the backend, and how many query heads share a KV head."""

    is_causal = True

    def __init__(self, config: Any, num_key_value_groups: int, layer_idx: int):
        super().__init__()
        self.config = config
        self.num_key_value_groups = num_key_value_groups
        self.layer_idx = layer_idx

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, T, d], key and value [B, G, S, d] -> output [B, T, H, d], weights [B, H, T, S] or None."""
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return interface(self, query, key, value, mask, **kwargs)


class GQEAttention(nn.Module):
    """Causal self-attention whose query heads are experts, for any PyTorch model.

    hidden_size: D. num_query_experts: N. num_kv_heads: G. top_k: k. head_dim: d, default D / N.
    variant: `gqe`, the paper's layer; `hard_concat`, its ablation with the hard slots alone; `weighted_concat`, its
        ablation with the slots scaled by their probability, no weighted slot and no shared head (Table 2).
    output_projection: `slot`, the paper's: W_O rows belong to the rank of a woken expert. `expert`: they belong to
        the expert, so that with k = M and the two extra slots zero or absent the layer is dense grouped-query
        attention; a dense checkpoint converts exactly.
    rope_theta: base of the rotary embedding; None, none.
    bias: on the q, k, v, o and shared-query projections; the router never has one. output_bias: on o alone, if that is
        another (Qwen2 has biases on all but o).
    layer_idx: this layer's place in the Transformers `Cache`.
    routing: `learned`; `frozen`, a random router that never trains, which tells routing apart from merely having more
        query parameters; `none`, no router and all experts in index order, which is the always-on model with as many
        heads: the control without which a gain can't be put down to routing.
    shared_head_kv: `mean` over the group's key and value heads, as in the reference layer; `first`, the first
        group's: no mean and no copy, and a paged cache serves it as it is.
    qk_norm: RMSNorm over the head dim of queries (the shared head's too) and keys, before the rotary embedding, as in
        Qwen3; its eps: norm_eps.
    dropout: on the attention weights, in training.
    attn_implementation: `sdpa`, `eager` or `flex_attention`.

    forced_indices, an attribute: the experts [B, T, G, k] to wake in place of the router's choice; see `replay`.
    fused_decode, an attribute of the class and of each layer: single tokens are decoded by a Triton kernel, on a GPU.
        Off by default: it pays over long caches and within CUDA graphs (docs/performance.md).

    Raises ValueError for a layout that can't be built.
    """

    fused_decode = False
    forced_indices: Tensor | None = None

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
        _config: Any = None,
    ):
        super().__init__()
        if head_dim is None:
            countable = all(isinstance(n, Integral) and n > 0 for n in (hidden_size, num_query_experts))
            if countable and hidden_size % num_query_experts:
                raise ValueError(
                    f"hidden_size is {hidden_size}; without head_dim it must be a multiple of num_query_experts, "
                    f"{num_query_experts}"
                )
            head_dim = hidden_size // num_query_experts if countable else 1  # check_layout refuses the count
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be 0 or more and below 1")
        check_layout(
            hidden_size, num_query_experts, num_kv_heads, top_k, head_dim, rope_theta is not None,
            variant, output_projection, routing, shared_head_kv,
        )  # fmt: skip
        if _config is None and attn_implementation not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
            allowed = ", ".join(["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()])
            raise ValueError(f"attn_implementation is {attn_implementation!r}; it must be one of {allowed}")
        num_query_experts, num_kv_heads, top_k, head_dim = map(int, (num_query_experts, num_kv_heads, top_k, head_dim))
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
        self.config = _config if _config is not None else AttentionBackend(attn_implementation)

        extra_slots = 2 if variant == "gqe" else 0
        hard_slots = num_kv_heads * top_k if output_projection == "slot" else num_query_experts
        self.q_proj = nn.Linear(hidden_size, num_query_experts * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(
            (hard_slots + extra_slots) * head_dim, hidden_size, bias=bias if output_bias is None else output_bias
        )
        self.router = Router(hidden_size, num_query_experts, routing == "learned") if routing != "none" else None
        self.q_shared = nn.Linear(hidden_size, head_dim, bias=bias) if variant == "gqe" else None
        self.q_norm = LlamaRMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = LlamaRMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.routed_heads = CausalKernel(self.config, top_k, layer_idx)
        self.shared_head = CausalKernel(self.config, 1, layer_idx) if variant == "gqe" else None
        self._warn_if_router_gets_no_gradient()

    def set_top_k(self, top_k: int) -> None:
        """Wake another number of experts in each group from now on.

        Raises ValueError where W_O's rows belong to slots, of which there would be more or fewer, or without a router.
        """
        if top_k != self.top_k and (self.output_projection != "expert" or self.router is None):
            raise ValueError(
                f"output_projection is {self.output_projection!r} and routing {self.routing!r}; to change top_k, they "
                "must be 'expert' and have a router"
            )
        whole = isinstance(top_k, Integral) and not isinstance(top_k, bool)
        if not whole or not 1 <= top_k <= self.experts_per_group:
            raise ValueError(f"top_k is {top_k!r}; it must be 1 to {self.experts_per_group}, the experts in a group")
        self.top_k = self.routed_heads.num_key_value_groups = top_k

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
        """x [B, T, D] -> y [B, T, D], and the routing if it is asked for.

        attention_mask: [B, S], nonzero for real tokens; causality holds beside it. position_ids: [B or 1, T], by
        default counted on from the cached tokens; where they restart, a new document begins that doesn't see the one
        before. past_key_values: a Transformers cache (dynamic or static), for any number of new tokens.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions; it must be [batch, keys]")
        mask = causal_mask(
            self.config, x, attention_mask, past_key_values, position_ids,
            materialise=uses_shared_decode(self, x.shape[1], past_key_values), layer_idx=self.layer_idx,
        )  # fmt: skip
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        new = torch.arange(x.shape[1], device=x.device) + past  # before the cache moves on
        cos_sin = None
        if self.rope_theta is not None:
            cos_sin = rotary_cos_sin(
                position_ids if position_ids is not None else new[None], self.head_dim, self.rope_theta, x.dtype
            )
        y, _, routing = self.route_and_attend(x, mask, cos_sin, past_key_values, position_ids=position_ids)
        if not output_routing:
            return y
        token_mask = attention_mask[:, new] if attention_mask is not None else None
        return y, Routing(routing.logits, routing.probs, routing.indices, self._balance_loss(routing, token_mask))

    def route_and_attend(
        self, x: Tensor, mask: Any, cos_sin: tuple[Tensor, Tensor] | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """The layer, given a mask from `causal_mask`: y [B, T, D], weights [B, heads, T, S] or None, and routing."""
        routing = self.route(x)
        if self._projects_selected_only(x):
            query, key, value = self.project_selected(x, routing)
        else:
            query, shared_query, key, value = self.project(x)
            query = self.select(query, shared_query, routing)
        query, key = self.normalise(query, key)
        query, key = self.rotate(query, key, cos_sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        routed, shared, weights = self.attend(query, key, value, mask, past_key_values, **kwargs)
        return self.o_proj(self.combine(routed, shared, routing)), weights, routing

    def route(self, x: Tensor) -> Routing:
        """x [B, T, D] -> probabilities [B, T, G, M] and woken experts [B, T, G, k]: softmax, then top-k."""
        B, T, _ = x.shape
        G, M = self.num_kv_heads, self.experts_per_group
        if self.router is None:
            probs = torch.full((B, T, G, M), 1 / M, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            return Routing(None, probs, torch.arange(M, device=x.device).expand(B, T, G, M))
        logits = self.router(x).view(B, T, G, M)
        probs = logits.softmax(-1)
        if self.forced_indices is not None:
            return Routing(logits, probs, self.forced_indices)
        return Routing(logits, probs, select_top_k(probs.detach(), self.top_k))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x [B, T, D] -> queries [B, T, G, M, d], the shared head's [B, T, d] or None, keys and values [B, G, T, d]."""
        B, T, _ = x.shape
        G, M, d = self.num_kv_heads, self.experts_per_group, self.head_dim
        query = self.q_proj(x).view(B, T, G, M, d)
        shared_query = self.q_shared(x) if self.q_shared is not None else None
        key = self.k_proj(x).view(B, T, G, d).transpose(1, 2)
        value = self.v_proj(x).view(B, T, G, d).transpose(1, 2)
        return query, shared_query, key, value

    def _projects_selected_only(self, x: Tensor) -> bool:
        """Whether reading the woken experts' weights alone is faster: for one token in all, on a CPU (as it was timed).

        And whether they may be read past their modules: plain weights without hooks, adapters, offloading or gradients.
        """
        one = x.is_cpu and x.shape[0] * x.shape[1] == 1 and self.experts_per_group >= SPARSE_FROM * self.top_k
        if not one or self.router is None or torch.compiler.is_compiling():
            return False
        return is_plain_linear(self.q_proj, x.device)

    def project_selected(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, 1, D] -> what `project` and `select` give: queries [1, G*k (+1), 1, d], keys, values [1, G, 1, d]."""
        G, M, d = self.num_kv_heads, self.experts_per_group, self.head_dim
        rows = row_numbers(routing.indices, M)  # [G*k]
        weight, bias = (
            t.view(G * M, d, *t.shape[1:]).index_select(0, rows).flatten(0, 1) if t is not None else None
            for t in (self.q_proj.weight, self.q_proj.bias)
        )  # [G*k*d, D], [G*k*d]
        query = F.linear(x, weight, bias)
        if self.q_shared is not None:
            query = torch.cat([query, self.q_shared(x)], -1)
        return query.view(1, -1, 1, d), self.k_proj(x).view(1, G, 1, d), self.v_proj(x).view(1, G, 1, d)

    def select(self, query: Tensor, shared_query: Tensor | None, routing: Routing) -> Tensor:
        """Queries [B, T, G, M, d] -> those of the woken experts, then of the shared head, [B, G*k (+1), T, d]."""
        if self.router is not None:
            query = select_experts(query, routing.indices)  # [B, T, G, k, d]
        query = query.flatten(2, 3)
        if shared_query is not None:
            query = torch.cat([query, shared_query.unsqueeze(2)], 2)
        return query.transpose(1, 2)

    def normalise(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm of queries and keys [B, heads, T, d] over the head dim, if the layer has it."""
        if self.q_norm is None or self.k_norm is None:
            return query, key
        return self.q_norm(query), self.k_norm(key)

    def rotate(self, query: Tensor, key: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Rotary embedding of queries and keys [B, heads, T, d], in Llama's half-rotation form.

        cos and sin of fewer than d numbers rotate the first of them alone (partial rotary embedding, as in Phi-4-mini).
        """
        if cos_sin is None:
            return query, key
        if cos_sin[0].shape[-1] < self.head_dim:
            return apply_partial_rotary_pos_emb(query, key, *cos_sin)
        if torch.compiler.is_compiling() or query.shape[2] > DECODE_TOKENS:
            return apply_rotary_pos_emb(query, key, *cos_sin)
        heads = torch.cat([query, key], 1)  # of so few tokens, both at once cost half the calls
        cos, sin = (t.unsqueeze(1) for t in cos_sin)
        return (heads * cos + rotate_half(heads) * sin).split([query.shape[1], key.shape[1]], 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Outputs of the woken experts [B, T, G, k, d] and of the shared head [B, T, d] (None without one)."""
        if self.shared_head is not None and kwargs.get("cache") is not None:
            # continuous batching's kernels would put the K/V of every call into the cache, the shared head's too
            key, value = kwargs.pop("cache").update(
                key_states=key, value_states=value, layer_idx=self.layer_idx, kwargs=kwargs
            )
            if kwargs.get("block_table") is not None:
                raise ValueError("continuous batching decodes from a block table, which can't serve the shared head")
        G, k = self.num_kv_heads, self.top_k
        routed_query, shared_query = query[:, : G * k], query[:, G * k :]
        visible = isinstance(mask, Tensor) and mask.ndim == 4 if mask is not None else query.shape[2] == 1
        dropout = self.dropout if self.training else 0.0
        if visible and uses_shared_decode(self, query.shape[2], past_key_values):
            B, _, T, d = query.shape
            queries = routed_query.view(B, G, k, T, d), shared_query.squeeze(1)
            if self.fused_decode and T == 1 and self._may_fuse(mask, query, key, value, dropout):
                from query_experts.ops.fused_decode import fused_decode  # needs triton

                routed, shared = fused_decode(*queries, key, value, mask, self.scaling)
                return routed.permute(0, 3, 1, 2, 4), shared, None
            routed, shared, weights = shared_decode(*queries, key, value, mask, self.scaling, dropout)
            wanted = None
            if self.config._attn_implementation == "eager":
                wanted = torch.cat([weights[:, :, :k].flatten(1, 2), weights[:, 0, k:]], 1)  # [B, G*k + 1, T, S]
            return routed.permute(0, 3, 1, 2, 4), shared, wanted

        kwargs |= {"scaling": self.scaling, "dropout": dropout}
        if self.shared_head is None:
            routed, weights = self.routed_heads(routed_query, key, value, mask, **kwargs)  # [B, T, G*k, d]
            return routed.unflatten(2, (G, k)), None, weights
        if self.shared_head_kv == "mean":
            shared_key, shared_value = key.mean(1, keepdim=True), value.mean(1, keepdim=True)
        else:
            shared_key, shared_value = key[:, :1], value[:, :1]
        if self.config._attn_implementation == "eager":
            # one call, so that the weights which are returned are those that the output was made with; eager would
            # repeat each KV head k times by itself
            key, value = (
                torch.cat([repeat_kv(routed, k), shared], 1)
                for routed, shared in ((key, shared_key), (value, shared_value))
            )
            out, weights = self.shared_head(query, key, value, mask, **kwargs)  # [B, T, G*k + 1, d]
            return out[:, :, :-1].unflatten(2, (G, k)), out[:, :, -1], weights
        routed, _ = self.routed_heads(routed_query, key, value, mask, **kwargs)
        shared, _ = self.shared_head(shared_query, shared_key, shared_value, mask, **kwargs)  # [B, T, 1, d]
        return routed.unflatten(2, (G, k)), shared.squeeze(2), None

    def _may_fuse(self, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
        """Whether nothing is wanted of decoding that the kernel doesn't give: gradients, weights, float64."""
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        plain = self.config._attn_implementation == "eager" or query.dtype == torch.float64 or dropout > 0
        return not (graded or plain) and (mask is None or mask.dtype == torch.bool)

    def combine(self, routed: Tensor, shared: Tensor | None, routing: Routing) -> Tensor:
        """The rows that W_O takes, [B, T, (G*k or N, + 2) * d]: hard slots, the weighted slot, the shared head."""
        extra = []
        if self.variant == "gqe":
            scores = routing.scores
            weights = scores / scores.sum((-2, -1), keepdim=True)  # renormalised over all groups' woken experts
            assert shared is not None
            if not torch.compiler.is_compiling() and routed.shape[1] <= DECODE_TOKENS:
                # of so few tokens, a product's call costs more than its work
                weighted = (weights[..., None] * routed).sum((2, 3)).to(routed.dtype)
            else:
                rows = routed.flatten(2, 3)  # [B, T, G*k, d]
                weighted = (weights.to(rows.dtype).flatten(2).unsqueeze(2) @ rows).squeeze(2)
            extra = [weighted, shared]
        elif self.variant == "weighted_concat":
            routed = routed * routing.scores.to(routed.dtype)[..., None]
        if self.output_projection == "expert" and self.router is not None:
            routed = scatter_experts(routed, routing.indices, self.experts_per_group)  # [B, T, G, M, d]
        return torch.cat([routed.flatten(2), *extra], -1)

    def _balance_loss(self, routing: Routing, token_mask: Tensor | None) -> Tensor:
        if routing.logits is None:
            return routing.probs.new_zeros(())
        logits = routing.logits.flatten(0, 1).flatten(1)
        statistics = routing_statistics((logits,), self.num_kv_heads, self.top_k, token_mask)
        tokens = statistics.tokens.clamp(min=1)
        return balance_loss(statistics.selected / tokens, statistics.prob_sum / tokens)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_query_experts}, kv_heads={self.num_kv_heads}, top_k={self.top_k}, "
            f"variant={self.variant}, output_projection={self.output_projection}, routing={self.routing}"
        )


def is_plain_linear(module: nn.Module, device: torch.device) -> bool:
    """Whether calling the module is `F.linear` with its weight and bias, and nothing that autograd has to see."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if type(module) is not nn.Linear or hooked:
        return False
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not graded and all(type(t) is nn.Parameter and t.device == device for t in tensors)


def uses_shared_decode(layer: Any, num_tokens: int, past_key_values: Cache | None) -> bool:
    """Whether so few new tokens meet a cache that the shared head is best computed from the scores of all heads.

    layer: the layer or its configuration.
    """
    return (
        past_key_values is not None
        and num_tokens <= DECODE_TOKENS
        and layer.variant == "gqe"
        and layer.shared_head_kv == "mean"
    )
