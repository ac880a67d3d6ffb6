"""Causal attention of the selected heads, and of the shared head over the mean of all groups' keys and values.

`attend` chooses the implementation: one or two calls of a kernel of Transformers' attention interface (`one_call`), or
one read of the cache for a few new tokens (`shared_decode`).

Shapes: B batch, T new tokens, S keys (cached and new), G groups, k selected experts in a group, H = G*k + 1 heads (G*k
without the shared head), d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from query_experts.ops.shared_decode import shared_decode

DECODE_TOKENS = 8  # up to this many new tokens, forming all their scores costs less than a mean over the cache
ONE_CALL_TOKENS = 16384  # from this many in all, a second call costs less than a copy of all keys and values (modelled)
SHORT_CACHE = 64  # keys of all rows up to which a CPU decodes faster in one call over copies of them (measured)
ONE_CALL_TOKENS_CPU = 1024  # a CPU takes as long for either, and the copy takes memory


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


def uses_shared_decode(layer: Any, num_tokens: int, past_key_values: Cache | None) -> bool:
    """Whether so few new tokens meet a cache that `shared_decode` serves them. layer: a layer or its configuration."""
    return (
        past_key_values is not None
        and num_tokens <= DECODE_TOKENS
        and layer.variant == "gqe"
        and layer.shared_head_kv == "mean"
    )


def is_empty(tensor: Tensor) -> bool:
    """Whether there is no batch row or no token, which most kernels refuse; an exported graph always has some."""
    return not torch.compiler.is_exporting() and tensor.numel() == 0


def one_call(layer: Any, query: Tensor, key: Tensor) -> bool:
    """Whether the routed heads and the shared head attend in one call, the latter over one more KV head.

    That saves a launch and needs a copy of the keys and values. It takes as many query heads for each KV head, so
    k = 1, and keys of the new tokens alone: a cache that holds more isn't copied. Eager attention always makes one
    call, so that the weights that it returns are those of the output.
    """
    if layer.config._attn_implementation == "eager":
        return True
    if layer.top_k > 1 or key.shape[2] != query.shape[2]:
        return False
    if torch.compiler.is_exporting():  # one graph for every length
        return True
    return query.shape[0] * query.shape[2] < (ONE_CALL_TOKENS_CPU if query.is_cpu else ONE_CALL_TOKENS)


def attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, past_key_values: Cache | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Outputs of the selected experts [B, T, G, k, d], of the shared head [B, T, d] or None, and weights or None.

    Args:
        layer: the `GQEAttention` that asks: its shape, kernels, backend and dropout are read.
        query: [B, H, T, d], the selected experts' first, then the shared head's.
        key: [B, G, S, d].
        value: [B, G, S, d].
        mask: from `causal_mask`.
        past_key_values: the cache that key and value come from, if any.
        **kwargs: passed on to the backend.

    Returns:
        The outputs; and the attention weights [B, H, T, S] where the backend is eager.
    """
    if is_empty(query):
        return _nothing(layer, query, key, value)
    num_tokens = query.shape[2]
    visible = isinstance(mask, Tensor) and mask.ndim == 4 if mask is not None else num_tokens == 1
    dropout = layer.dropout if layer.training else 0.0
    if visible and uses_shared_decode(layer, num_tokens, past_key_values) and not layer.is_group_parallel:
        if _is_short(layer, key):
            return _one_call(layer, query, key, value, mask, scaling=layer.scaling, dropout=dropout)
        return _decode(layer, query, key, value, mask, dropout)
    kwargs |= {"scaling": layer.scaling, "dropout": dropout}
    if layer.shared_head is None:
        routed, weights = layer.routed_heads(query, key, value, mask, **kwargs)  # [B, T, G*k, d]
        return routed.unflatten(2, (layer.num_kv_heads, layer.top_k)), None, weights
    attend_all = _one_call if one_call(layer, query, key) else _two_calls
    return attend_all(layer, query, key, value, mask, **kwargs)


def _is_short(layer: Any, key: Tensor) -> bool:
    """Whether a CPU copies all keys and values, and their means, sooner than it makes the calls that avoid it."""
    few = key.is_cpu and not torch.compiler.is_compiling() and key.shape[0] * key.shape[2] <= SHORT_CACHE
    return few and layer.top_k == 1 and layer.config._attn_implementation == "sdpa"


def _nothing(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The outputs of `attend` for no queries. The sums change nothing: by them, keys and values get zero gradients."""
    out = query.transpose(1, 2) + key.sum() + value.sum()  # [B, T, H, d]
    routed, shared = out, None
    if layer.shared_head is not None:
        routed, shared = out[:, :, :-1], out[:, :, -1]
    weights = None
    if layer.config._attn_implementation == "eager":
        weights = query.new_zeros(*query.shape[:3], key.shape[2])
    return routed.unflatten(2, (layer.num_kv_heads, layer.top_k)), shared, weights


def _split_queries(layer: Any, query: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, T, d] -> the selected experts' [B, G, k, T, d] and the shared head's [B, T, d]."""
    routed = query[:, :-1].view(query.shape[0], layer.num_kv_heads, layer.top_k, *query.shape[2:])
    return routed, query[:, -1:].squeeze(1)


def _decode(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    routed, shared, weights = shared_decode(*_split_queries(layer, query), key, value, mask, layer.scaling, dropout)
    returned = None
    if layer.config._attn_implementation == "eager":
        returned = torch.cat([weights[:, :, :-1].flatten(1, 2), weights[:, 0, -1:]], 1)  # [B, H, T, S]
    return routed.permute(0, 3, 1, 2, 4), shared, returned


def _two_calls(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, None]:
    routed_query, shared_query = query.split([query.shape[1] - 1, 1], 1)
    routed, _ = layer.routed_heads(routed_query, key, value, mask, **kwargs)
    shared_key, shared_value = layer.shared_key_value(key, value)  # here, so as to take no memory before
    shared, _ = layer.shared_head(shared_query, shared_key, shared_value, mask, **kwargs)  # [B, T, 1, d]
    return routed.unflatten(2, (layer.num_kv_heads, layer.top_k)), shared.squeeze(2), None


def _one_call(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One call over one more KV head; each of the others is repeated k times beforehand."""
    shared_key, shared_value = layer.shared_key_value(key, value)
    key, value = (
        torch.cat([repeat_kv(routed, layer.top_k), shared], 1)
        for routed, shared in ((key, shared_key), (value, shared_value))
    )
    out, weights = layer.shared_head(query, key, value, mask, **kwargs)  # [B, T, H, d]
    if layer.config._attn_implementation != "eager":
        weights = None
    routed, shared = out.split([out.shape[2] - 1, 1], 2)
    return routed.unflatten(2, (layer.num_kv_heads, layer.top_k)), shared.squeeze(2), weights
