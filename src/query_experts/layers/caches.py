"""Notices two layers that write to one place of a cache, which would mix their keys without a word."""

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

    A copy may go on where its original stopped: what counts is whether both are known to project keys and values by
    other weights. Weights that are quantised, adapted, sharded, offloaded, or of another dtype or device can't be
    compared, and are no reason to refuse.

    Args:
        cache: before the layer's new keys and values are added.
        layer_idx: the layer's place in it.
        layer: has `k_proj` and `v_proj`.

    Raises:
        ValueError: naming layer_idx.
    """
    if torch.compiler.is_compiling():
        return
    writers = _writers.setdefault(cache, {})
    last = writers[layer_idx]() if layer_idx in writers else None
    if last is layer:
        return
    if last is not None and _holds_keys(cache, layer_idx) and _known_to_differ(last, layer):
        raise ValueError(
            f"layer_idx is {layer_idx}, where another layer has written to this cache; each layer that shares a cache "
            "must have its own (a copy of the cache, by copy.deepcopy, may go to another model)"
        )
    writers[layer_idx] = weakref.ref(layer)


def _holds_keys(cache: Cache, layer_idx: int) -> bool:
    """Whether there are keys; a static cache's number of them can't be read while a CUDA graph is captured."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not capturing and int(cache.get_seq_length(layer_idx)) > 0


def _known_to_differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers project to keys or values by other weights, as far as both can be read."""
    for name in ("k_proj", "v_proj"):
        maps = getattr(one, name), getattr(other, name)
        if any(type(m) is not nn.Linear or not _can_be_read(m.weight) for m in maps):
            return False
        a, b = (m.weight for m in maps)
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        if not torch.equal(a, b):
            return True
    return False


def _can_be_read(weight: Tensor) -> bool:
    """Whether a weight has values, here and now: sharding frees the storage of layers that don't run."""
    return has_values(weight) and weight.untyped_storage().nbytes() >= weight.nbytes
