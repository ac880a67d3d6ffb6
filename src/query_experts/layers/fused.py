"""The layer's forward pass by Triton kernels: two launches beside the matrix products and attention.

    projections -> prepare (select, normalise, rotate, average for the shared head) -> attention -> combine -> W_O

The backward pass has as many. Attention is one call of the backend where the shared head's keys are those of the new
tokens alone: `prepare` writes them as one more KV head. One new token over a cache takes two launches for attention and
the slots (`decode`), and `prepare` writes into a static cache in place. Elsewhere `attend` serves, as on the plain
path.

Shapes: B batch, T new tokens, R = B*T, D hidden size, G groups, M experts in a group, k selected in a group, d head
dim, C copies of the shared query, H = G*k + C query heads, GK = G + 1 key heads with the shared one, else G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from query_experts.layers.caches import check_writer
from query_experts.layers.masks import has_values
from query_experts.layers.router import Router
from query_experts.ops.attend import ONE_CALL_TOKENS, attend, uses_shared_decode
from query_experts.ops.fused import Combine, Layout, Prepare, ProjectAndPrepare, operators, wide_product
from query_experts.ops.select import is_hooked
from query_experts.ops.triton_decode import triton_decode

JOINED_BYTES = 8 * 2**20  # of the projections' weights; larger ones aren't joined for one product
MOST_DECODED_GROUPS = 16  # of the kernel for one token; the sums of more don't fit into registers (compiled)


@dataclass(frozen=True)
class Prepared:
    """heads [B, T, H, d], keys and values [B, T, GK, d] unless they are in a static cache, logits [R, G*M] or None,
    indices [B, T, G, k] or None."""

    heads: Tensor
    keys: Tensor | None
    values: Tensor | None
    logits: Tensor | None
    indices: Tensor | None


def fused_attention(
    layer: Any,
    x: Tensor,
    mask: Any,
    cos_sin: tuple[Tensor, Tensor] | None,
    past_key_values: Cache | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`GQEAttention.route_and_attend` by the kernels.

    Returns:
        y [B, T, D], attention weights [B, heads, T, S] or None, router logits [B, T, G, M] or None, and the selected
        experts [B, T, G, k] or None for all.
    """
    keys_are_new = _keys_are_new(layer, x.shape[1], past_key_values, kwargs)
    layout = _layout(layer, x, mask, keys_are_new)
    static = _static_layer(layer, x, past_key_values)
    prepared = prepare(layer, x, cos_sin, layout, static)
    if static is None:
        assert prepared.keys is not None
        assert prepared.values is not None
        key, value = (t[:, :, : layout.G].transpose(1, 2) for t in (prepared.keys, prepared.values))
        if not (keys_are_new and _hand_over(layer, past_key_values, key, value)):
            key, value = layer.update_caches(key, value, past_key_values, kwargs)
    else:
        key, value = static.keys, static.values
    weights = None
    if layout.shared_key:
        heads, shared, weights = _attend_to_new_keys(layer, prepared, layout, mask, **kwargs)
        slots = combine(layer, heads, shared, prepared)
    elif past_key_values is not None and _decodes(layer, prepared.heads, key, value, mask, past_key_values):
        slots = _decode(layer, prepared, key, value, mask)
    else:
        query = prepared.heads.transpose(1, 2)
        routed, shared, weights = attend(layer, query, key, value, mask, past_key_values, **kwargs)
        slots = combine(layer, routed.flatten(2, 3), shared, prepared)
    y = layer.o_proj(slots.view(*x.shape[:2], -1))
    logits = None
    if prepared.logits is not None:
        logits = prepared.logits.view(*x.shape[:2], layout.G, layout.M)
    return y, weights, logits, prepared.indices


def _layout(layer: Any, x: Tensor, mask: Any, keys_are_new: bool) -> Layout:
    batch, num_tokens, _ = x.shape
    by_head = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1  # fits the plain path's heads
    shared_key = layer.shared_head is not None and keys_are_new and not (by_head and layer.top_k > 1)
    copies = 0 if layer.shared_head is None else 1
    if shared_key and _one_call(layer, batch * num_tokens):
        copies = layer.top_k
    return Layout(
        batch, layer.num_kv_heads, layer.experts_per_group, layer.top_k, copies, layer.head_dim, shared_key,
        layer.shared_head_kv == "mean", getattr(layer.q_norm, "variance_epsilon", 0.0),
    )  # fmt: skip


def _keys_are_new(layer: Any, num_tokens: int, past_key_values: Cache | None, kwargs: dict[str, Any]) -> bool:
    """Whether the layer attends to the keys of x alone: without a cache, or with one that is empty and grows."""
    if kwargs.get("cache") is not None:  # continuous batching's
        return False
    if past_key_values is None:
        return True
    if type(past_key_values) is not DynamicCache or uses_shared_decode(layer, num_tokens, past_key_values):
        return False
    return bool(past_key_values.get_seq_length(layer.layer_idx) == 0)


def _static_layer(layer: Any, x: Tensor, past_key_values: Any) -> StaticLayer | None:
    """The layer's part of a static cache, where `prepare` may write into it as the cache itself would."""
    if type(past_key_values) is not StaticCache or past_key_values.offloading or torch.is_grad_enabled():
        return None
    layers = past_key_values.layers
    part: Any = layers[layer.layer_idx] if layer.layer_idx < len(layers) else None
    if type(part) is not StaticLayer or not part.is_initialized:
        return None
    fits = part.dtype == x.dtype and part.device == x.device and part.keys.shape[0] == x.shape[0]
    if not fits or torch.is_autocast_enabled(x.device.type):
        return None
    if _is_full(part, x):
        return None  # the cache itself says so
    check_writer(past_key_values, layer.layer_idx, layer)
    return part


def _is_full(part: StaticLayer, x: Tensor) -> bool:
    """Whether a static cache has no room for x [B, T, D], as far as can be told: a GPU would have to be waited for."""
    if not x.is_cpu or torch.compiler.is_compiling() or not has_values(part.cumulative_length):
        return False
    return int(part.cumulative_length.numpy()) + x.shape[1] > part.max_cache_len


def _hand_over(layer: Any, past_key_values: Any, key: Tensor, value: Tensor) -> bool:
    """Makes keys and values [B, G, T, d] those of an empty growing cache, without its copy; says whether it did."""
    if type(past_key_values) is not DynamicCache or past_key_values.offloading or key.requires_grad:
        return False
    if layer.layer_idx > len(past_key_values):
        return False
    if layer.layer_idx == len(past_key_values):
        if past_key_values.layer_class_to_replicate is not DynamicLayer:
            return False
        past_key_values.layers.append(DynamicLayer())
    part = past_key_values.layers[layer.layer_idx]
    if type(part) is not DynamicLayer:
        return False
    check_writer(past_key_values, layer.layer_idx, layer)
    part.lazy_initialization(key, value)
    part.keys, part.values = key, value
    return True


def _decodes(layer: Any, heads: Tensor, key: Tensor, value: Tensor, mask: Any, past_key_values: Cache) -> bool:
    """Whether the kernel for one new token serves: no gradients, weights or dropout are asked for, the mask says for
    each key whether it is seen, and attention isn't another backend's. heads [B, T, H, d]."""
    backend = layer.config._attn_implementation
    if backend == "eager" or not (backend == "sdpa" or uses_shared_decode(layer, heads.shape[1], past_key_values)):
        return False
    if heads.shape[1] != 1 or any(t.requires_grad for t in (heads, key, value)):
        return False
    if (layer.training and layer.dropout > 0) or layer.num_kv_heads > MOST_DECODED_GROUPS:
        return False
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1


def _decode(layer: Any, prepared: Prepared, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The slots [B, slots * d] of one new token over keys and values [B, G, S, d]."""
    logits = None if prepared.logits is None else prepared.logits.unflatten(-1, (layer.num_kv_heads, -1))
    return triton_decode(
        prepared.heads[:, 0], key, value, None if mask is None else mask[:, 0, 0], logits,
        None if prepared.indices is None else prepared.indices[:, 0], layer.scaling, layer.variant,
        layer.output_projection, layer.shared_head_kv,
    )  # fmt: skip


def _one_call(layer: Any, num_rows: int) -> bool:
    """Whether routed heads and the shared head attend in one call over G + 1 KV heads; the shared query then comes k
    times, as each KV head serves as many queries."""
    return layer.top_k == 1 or num_rows < ONE_CALL_TOKENS or layer.config._attn_implementation == "eager"


def prepare(
    layer: Any, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, layout: Layout, static: StaticLayer | None
) -> Prepared:
    """Projects x [B, T, D], selects, normalises and rotates; keys and values go into the static cache, if any."""
    batch, num_tokens, _ = x.shape
    rows = x.reshape(batch * num_tokens, -1)
    given = None if layer.forced_indices is None or layer.router is None else _given_experts(layer, x)
    norms: tuple[Tensor | None, Tensor | None] = (None, None)
    if layer.q_norm is not None and _are_plain_norms(layer, rows):
        norms = layer.q_norm.weight, layer.k_norm.weight
    norms_apart = layer.q_norm is not None and norms[0] is None
    angles = cos_sin if cos_sin is not None else (None, None)
    rest = (None if given is None else given.flatten(0, 1), *angles, *norms)

    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.q_shared)
    plain = all(_is_plain(module, rows) for module in (*projections, layer.router))
    keys = values = None
    in_one = plain and not norms_apart and x.dtype != torch.float16  # in which a logit's small gradient would be 0
    if in_one and torch.is_grad_enabled():
        weights, biases = (_of_each(projections, name) for name in ("weight", "bias"))
        router = None if layer.router is None else layer.router.weight
        heads, keys, values, logits, chosen = ProjectAndPrepare.apply(rows, *weights, *biases, router, *rest, layout)
    else:
        readable = plain and not torch.is_grad_enabled()
        logits = None
        if layer.router is not None:
            # checkpointing runs a training layer without gradients first, and must select the same experts
            by_product = readable and (in_one or not layer.training)
            logits = wide_product(rows, layer.router.weight) if by_product else layer.router(x)
        projected = _project(layer, x, projections, layout.widths, readable, norms_apart)
        inputs = (*projected, None if logits is None else logits.detach(), *rest)
        if static is None:
            heads, keys, values, chosen = Prepare.apply(*inputs, layout)
        else:
            heads, chosen = operators.prepare_cached(
                *inputs, layout.eps, static.keys, static.values, static.cumulative_length, *layout.heads
            )
            static.cumulative_length.add_(num_tokens)
    if given is None and layer.router is not None:
        given = chosen.view(batch, num_tokens, layout.G, layout.k)
    return Prepared(heads, keys, values, logits, given)


def _project(
    layer: Any, x: Tensor, projections: Sequence[nn.Module | None], widths: list[int], readable: bool,
    norms_apart: bool,
) -> list[Tensor | None]:  # fmt: skip
    """x [B, T, D] -> query, key, value and shared query, [R, width] each or None; in one product where that is fast.

    readable: whether the weights can be read past their modules. norms_apart: whether to call the norms' modules here.
    """
    projected = None
    if readable and not layer.training:  # for checkpointing, as above
        projected = _in_one_product(projections, x.flatten(0, 1), widths)
    if projected is None:
        projected = [None if module is None else module(x).flatten(0, 1) for module in projections]
    return _normalised(layer, projected) if norms_apart else projected


def _given_experts(layer: Any, x: Tensor) -> Tensor:
    """forced_indices [B, T, G, k] as int64, within bounds."""
    given, shape = layer.forced_indices, (*x.shape[:2], layer.num_kv_heads, layer.top_k)
    if given.shape != shape:
        raise ValueError(f"forced_indices has shape {list(given.shape)}; it must have {list(shape)}")
    return given.long().clamp(0, layer.experts_per_group - 1)


def _are_plain_norms(layer: Any, rows: Tensor) -> bool:
    """Whether the norms are what the kernels compute: RMSNorm by a weight that can be read past its module."""
    norms = (layer.q_norm, layer.k_norm)
    if any(type(norm) is not LlamaRMSNorm or is_hooked(norm) for norm in norms):
        return False
    weights = [norm.weight for norm in norms]
    plain = all(type(w) is nn.Parameter and w.device == rows.device for w in weights)
    return plain and norms[0].variance_epsilon == norms[1].variance_epsilon


def _normalised(layer: Any, projected: list[Tensor | None]) -> list[Tensor | None]:
    """Query, key, value and shared query [R, width], with queries and keys normalised by the norms' own modules."""
    query, key, value, shared = projected
    assert query is not None
    assert key is not None
    heads = [t.unflatten(-1, (-1, layer.head_dim)) for t in (query, shared) if t is not None]
    query, *rest = layer.q_norm(torch.cat(heads, 1)).split([t.shape[1] for t in heads], 1)
    key = layer.k_norm(key.unflatten(-1, (-1, layer.head_dim)))
    return [query.flatten(1), key.flatten(1), value, rest[0].flatten(1) if rest else None]


def _of_each(modules: Sequence[nn.Module | None], name: str) -> list[Tensor | None]:
    return [None if module is None else getattr(module, name) for module in modules]


def _in_one_product(
    projections: Sequence[nn.Module | None], rows: Tensor, widths: list[int]
) -> list[Tensor | None] | None:
    """rows [R, D] by all projections at once, without gradients: [R, width] each, or None where the weights are large.

    The weights are joined anew in every call, so none is ever out of date. Small ones take less time to copy than three
    more products take to start (predicted: 4 MB at the paper's shape).
    """
    weights, biases = ([t for t in _of_each(projections, name) if t is not None] for name in ("weight", "bias"))
    if len(biases) not in (0, len(weights)) or sum(t.nbytes for t in weights) > JOINED_BYTES:
        return None
    joined = F.linear(rows, torch.cat(weights), torch.cat(biases) if biases else None)
    return [part if part.shape[1] else None for part in joined.split(widths, 1)]


def _is_plain(module: nn.Module | None, rows: Tensor) -> bool:
    """Whether a module is a linear map, or the router, whose weights can be read past its call, in the dtype of x."""
    if module is None:
        return True
    if type(module).forward not in (nn.Linear.forward, Router.forward) or is_hooked(module):
        return False
    if torch.is_autocast_enabled(rows.device.type):
        return False
    tensors = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t is not None]
    return all(type(t) in (nn.Parameter, Tensor) and (t.dtype, t.device) == (rows.dtype, rows.device) for t in tensors)


def _attend_to_new_keys(
    layer: Any, prepared: Prepared, layout: Layout, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Heads [B, T, H, d], the shared head apart [B, T, d] if it attends in a call of its own, and weights or None."""
    assert prepared.keys is not None
    assert prepared.values is not None
    kwargs |= {"scaling": layer.scaling, "dropout": layer.dropout if layer.training else 0.0}
    query, key, value = (t.transpose(1, 2) for t in (prepared.heads, prepared.keys, prepared.values))
    G, routed = layout.G, layout.G * layout.k
    if layout.copies == layout.k:
        heads, weights = layer.routed_heads(query, key, value, mask, **kwargs)
        weights = weights[:, : routed + 1] if layer.config._attn_implementation == "eager" else None
        return heads, None, weights
    heads, _ = layer.routed_heads(query[:, :routed], key[:, :G], value[:, :G], mask, **kwargs)
    shared, _ = layer.shared_head(query[:, routed:], key[:, G:], value[:, G:], mask, **kwargs)
    return heads, shared.squeeze(2), None


def combine(layer: Any, heads: Tensor, shared: Tensor | None, prepared: Prepared) -> Tensor:
    """The rows that W_O takes, [R, slots * d]. heads [B, T, H, d]; shared [B, T, d], or None where it is among them."""
    weighted_slot, scaled = layer.variant == "gqe", layer.variant == "weighted_concat"
    by_expert = layer.output_projection == "expert" and layer.router is not None
    heads = heads.flatten(0, 1)
    if not (weighted_slot or scaled or by_expert):
        return heads.flatten(1)
    indices = None if prepared.indices is None else prepared.indices.flatten(0, 1)
    logits = prepared.logits if weighted_slot or scaled else None
    shared = None if shared is None else shared.flatten(0, 1)
    return Combine.apply(
        heads, shared, logits, indices, layer.num_kv_heads, layer.experts_per_group, layer.top_k, layer.head_dim,
        by_expert, weighted_slot, scaled,
    )  # fmt: skip
