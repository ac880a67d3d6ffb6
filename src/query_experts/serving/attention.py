"""GQE attention over vLLM's paged KV cache, for a flat batch of tokens: route, select, attend, combine.

The selected queries are ordinary heads over the G KV heads, so they run in vLLM's own `Attention`, on any of its
kernels. A paged kernel needs the same number of queries for each KV head. So the shared head's mean K/V is cached as
one more KV head, which enlarges the cache by 1/G. Its query is repeated k times, and one of the results is kept; with
k = 1 nothing is computed twice.

Shapes: T tokens of all requests, D hidden size, d head dim, N query experts, M experts in a group, k active experts per
group; G groups in all, of which a tensor-parallel rank has L = G / ranks, with all their experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from query_experts.layers.router import Router, select_top_k
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.ops.select import scatter_experts, select_experts
from query_experts.serving.rotary import rotary_embedding


@torch.library.custom_op("query_experts::record_routing", mutates_args=["indices"])
def record_routing(indices: Tensor, layer_name: str) -> None:
    """Pass a layer's selected experts [T, G, k] to its `capture_fn`, as [T, G*k], numbered 0 to N-1.

    It is an operator because a compiled graph wouldn't call a `capture_fn` that is set later. It is declared to change
    the indices, although it only reads them: a compiler removes an operator without effect.
    """
    layer: VLLMGQEAttention = get_forward_context().no_compile_layers[layer_name]
    if layer.capture_fn is not None:
        first = torch.arange(0, layer.groups * layer.experts, layer.experts, device=indices.device)
        layer.capture_fn((indices + first[:, None]).flatten(1))


def tensor_parallel_ranks(num_kv_heads: int) -> int:
    """The number of tensor-parallel ranks. Raises ValueError if the KV groups can't be split evenly over them."""
    ranks = get_tensor_model_parallel_world_size()
    if num_kv_heads % ranks:
        raise ValueError(
            f"tensor_parallel_size is {ranks}; it must divide num_key_value_heads, {num_kv_heads}: a group of "
            "query experts stays on one rank"
        )
    return ranks


class VLLMGQEAttention(nn.Module):
    """`query_experts.GQEAttention` for serving, with the arguments that vLLM's Llama layer gives its attention.

    Args:
        config: the model's configuration.
        hidden_size, num_heads, num_kv_heads, max_position_embeddings: D, N, G, and the positions of the model.
        quant_config, cache_config, prefix, attn_type: as for other attention layers in vLLM.
        bias, bias_o_proj: ignored. vLLM's Llama layer also derives them from fields that GQE doesn't have.

    Attributes:
        layer_id, capture_fn: by these vLLM recognises a layer whose routing it can record, and receives the routing
            (`--enable-return-routed-experts`).

    Raises:
        ValueError: if the number of ranks doesn't divide G, if max_model_len exceeds the rotary embedding, or if
            routing is to be recorded and vLLM has another number of experts.
    """

    def __init__(
        self,
        config: GQEConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ):
        super().__init__()
        self.ranks = tensor_parallel_ranks(num_kv_heads)
        self.groups = num_kv_heads
        self.own_groups = num_kv_heads // self.ranks
        self.first_group = get_tensor_model_parallel_rank() * self.own_groups
        self.experts = num_heads // num_kv_heads
        self.top_k = config.active_query_experts
        self.head_dim = config.head_dim
        self.variant = config.variant
        self.shared_head_kv = config.shared_head_kv
        self.by_expert = config.output_projection == "expert"

        linear = {"bias": config.attention_bias, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            hidden_size, self.head_dim, num_heads, num_kv_heads, prefix=f"{prefix}.qkv_proj", **linear
        )
        self.router = Router(hidden_size, num_heads).float() if config.routing != "none" else None
        self.q_shared = None
        if self.variant == "gqe":
            self.q_shared = ReplicatedLinear(hidden_size, self.head_dim, prefix=f"{prefix}.q_shared", **linear)
        self.o_proj = RowParallelLinear(
            self._output_slots() * self.head_dim, hidden_size,
            bias=config.attention_bias if config.attention_output_bias is None else config.attention_output_bias,
            quant_config=quant_config, prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.rotary_emb = rotary_embedding(
            config, max_position_embeddings, get_current_vllm_config().model_config.max_model_len
        )
        self.name = prefix
        self.layer_id = extract_layer_index(prefix)
        self.capture_fn: Callable[[Tensor], None] | None = None
        self.records = self._records_routing()
        cached_heads = self.own_groups + (self.q_shared is not None)
        self.attn = Attention(
            cached_heads * self.top_k, self.head_dim, self.head_dim**-0.5, num_kv_heads=cached_heads,
            cache_config=cache_config, quant_config=quant_config, attn_type=attn_type, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def _output_slots(self) -> int:
        """Slots of W_O, summed over the ranks: the hard slots (or experts), and both extra slots on each rank."""
        hard_slots = self.groups * (self.experts if self.by_expert else self.top_k)
        return hard_slots + (2 * self.ranks if self.variant == "gqe" else 0)

    def _records_routing(self) -> bool:
        """Whether vLLM asks for the selected experts; registers the layer, so that `record_routing` finds it."""
        vllm_config = get_current_vllm_config()
        vllm_config.compilation_config.static_forward_context[self.name] = self
        if not vllm_config.aux_output_config.enable_return_routed_experts:
            return False
        if self.router is None:
            raise ValueError("routing is 'none'; without a router there is no routing to record")
        configured = vllm_config.model_config.get_num_experts(), vllm_config.model_config.get_num_experts_per_tok()
        actual = self.groups * self.experts, self.groups * self.top_k
        if configured != actual:
            raise ValueError(
                f"num_experts and num_experts_per_tok are {configured[0]} and {configured[1]}; to record this model's "
                f"routing, hf_overrides must say {actual[0]} and {actual[1]}"
            )
        return True

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions int [T], counted within each request; hidden_states [T, D] -> [T, D]."""
        probs, indices = self.route(hidden_states)
        if self.records or self.capture_fn is not None:
            record_routing(indices, self.name)
        query, key, value = self.project(hidden_states, indices)
        query, key = self.normalise(query, key)
        query, key = self.rotary_emb(positions, query, key)
        key, value = self.with_shared_head(key, value)
        out = self.attn(query, key, value)
        return self.o_proj(self.combine(out, probs, indices))[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> probabilities, float32 [T, G, M], and selected experts, int64 [T, G, k].

        Both are of all ranks' groups, because the weighted slot's weights are normalised over all groups.
        """
        shape = (x.shape[0], self.groups, self.experts)
        if self.router is None:
            probs = x.new_full(shape, 1 / self.experts, dtype=torch.float32)
            return probs, torch.arange(self.experts, device=x.device).expand(shape)
        logits = self.router(x.unsqueeze(0)).view(shape)
        return logits.softmax(-1), select_top_k(logits, self.top_k)

    def own(self, all_groups: Tensor) -> Tensor:
        """This rank's groups: [T, G, ...] -> [T, L, ...]."""
        return all_groups.narrow(1, self.first_group, self.own_groups)

    def project(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> queries [T, (L*k + k) * d], keys and values [T, L*d].

        The queries are those of the selected experts, then k times the shared head's, if there is one.
        """
        L, M, d = self.own_groups, self.experts, self.head_dim
        query, key, value = self.qkv_proj(x)[0].split([L * M * d, L * d, L * d], -1)
        if self.router is not None:
            query = select_experts(query.reshape(1, -1, L, M, d), self.own(indices).unsqueeze(0)).view(
                -1, L * self.top_k * d
            )
        if self.q_shared is not None:
            query = torch.cat([query, self.q_shared(x)[0].repeat(1, self.top_k)], -1)
        return query, key, value

    def normalise(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """QK norm: RMSNorm over d of queries and keys [T, heads * d], if the model has it."""
        if self.q_norm is None or self.k_norm is None:
            return query, key
        query_by_head, key_by_head = (t.reshape(t.shape[0], -1, self.head_dim) for t in (query, key))
        return self.q_norm(query_by_head).view(query.shape), self.k_norm(key_by_head).view(key.shape)

    def with_shared_head(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values to cache: [T, L*d] -> [T, (L + 1) * d], with those of the shared head, if there is one."""
        if self.q_shared is None:
            return key, value
        by_head = torch.stack([key, value]).view(2, -1, self.own_groups, self.head_dim)
        if self.shared_head_kv == "first":  # on rank 0 that of group 0; the other ranks' shared heads meet zeros in W_O
            shared = by_head[:, :, 0]
        else:
            shared = by_head.mean(2)
            if self.ranks > 1:
                shared = tensor_model_parallel_all_reduce(shared) / self.ranks
        return torch.cat([key, shared[0]], -1), torch.cat([value, shared[1]], -1)

    def combine(self, out: Tensor, probs: Tensor, indices: Tensor) -> Tensor:
        """Attention's output [T, (L*k + k) * d] -> this rank's input of W_O, [T, columns of its W_O].

        It consists of the hard slots (or experts), this rank's part of the weighted slot, and the shared head.
        """
        by_head = out.view(out.shape[0], -1, self.top_k, self.head_dim)  # [T, L (+ 1), k, d]
        routed, extra = by_head[:, : self.own_groups], []
        scores = probs.gather(-1, indices)  # [T, G, k]
        if self.variant == "gqe":
            weights = self.own(scores / scores.sum((1, 2), keepdim=True))
            weighted = (weights.unsqueeze(-1) * routed).sum((1, 2)).to(routed.dtype)  # [T, d]
            extra = [weighted, by_head[:, -1, 0]]
        elif self.variant == "weighted_concat":
            routed = routed * self.own(scores).unsqueeze(-1).to(routed.dtype)
        if self.by_expert and self.router is not None:
            scattered = scatter_experts(routed.unsqueeze(0), self.own(indices).unsqueeze(0), self.experts)
            routed = scattered[0]  # [T, L, M, d]
        return torch.cat([routed.flatten(1), *extra], -1)
