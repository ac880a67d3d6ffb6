"""Reads a cache's length, and notices two layers that write to one place of it, which would mix their keys."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache

from query_experts.layers.masks import has_values

# cache -> its layer_idx -> the layer that wrote there last; kept apart from both, so that copies and pickles know none
_writers: MutableMapping[Cache, dict[int, weakref.ref[nn.Module]]] = WeakIdKeyDictionary()


def check_writer(cache: Cache, layer_idx: int, layer: nn.Module) -> None:
    """Refuses a layer that would add to the keys and values of another one. Compiled code checks nothing.

    A copy may go on where its original stopped. Refused is a layer that is known to compute other keys or values: by
    another size, weight, bias, norm or rotary base. What can't be compared is no reason to refuse: weights that are
    quantised, adapted, sharded or offloaded, or of another dtype or device.

    Args:
        cache: before the layer's new keys and values are added.
        layer_idx: the layer's place in it.
        layer: has `k_proj` and `v_proj`, and maybe `k_norm` and `rope_theta`.

    Raises:
        ValueError: naming layer_idx.
    """
    if torch.compiler.is_compiling():
        return
    writers = _writers.setdefault(cache, {})
    last = writers[layer_idx]() if layer_idx in writers else None
    if last is layer:
        return
    if last is not None and cached_tokens(cache, layer_idx) and _known_to_differ(last, layer):
        raise ValueError(
            f"layer_idx is {layer_idx}, where another layer has written to this cache; each layer that shares a cache "
            "must have its own (a copy of the cache, by copy.deepcopy, may go to another model)"
        )
    writers[layer_idx] = weakref.ref(layer)


def cached_tokens(cache: Cache, layer_idx: int) -> int | None:
    """The number of cached tokens; None where it can't be read now: compiled, in a CUDA graph, or without values."""
    length = cache.get_seq_length(layer_idx)
    if isinstance(length, int):
        return length
    if torch.compiler.is_compiling() or not has_values(length):
        return None
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return None if capturing else int(length)


def _known_to_differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers compute keys or values in another way, as far as both can be read."""
    if type(one) is type(other) and getattr(one, "rope_theta", None) != getattr(other, "rope_theta", None):
        return True
    for name in ("k_proj", "v_proj"):
        a, b = getattr(one, name), getattr(other, name)
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            continue
        if (a.in_features, a.out_features) != (b.in_features, b.out_features):
            return True
        if _tensors_differ(a.weight, b.weight) or _tensors_differ(a.bias, b.bias):
            return True
    norms = (getattr(layer, "k_norm", None) for layer in (one, other))
    return _tensors_differ(*(getattr(norm, "weight", None) for norm in norms))


def _tensors_differ(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is not b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or not (_can_be_read(a) and _can_be_read(b)):
        return False
    return not torch.equal(a, b)


def _can_be_read(weight: Tensor) -> bool:
    """Whether a weight has values, here and now: sharding frees the storage of layers that don't run."""
    return has_values(weight) and weight.untyped_storage().nbytes() >= weight.nbytes
