"""Decoding on a CPU: one product for queries, keys and values, by a packed copy of four weights.

A product of 16-bit numbers on a CPU costs some 20 microseconds before it computes anything, as much as the layer's
small products take; a step over a short cache is made of such costs. The router stays apart: its logits are float32.

A stale copy would be wrong in silence, and not every write to a weight is noticed: a version counter misses writes
through `.data` and those of a fused optimizer. So a copy lives no longer than one generation: it is made at the second
step in a row that decodes with one cache, and any other use of the layer drops it. Within a generation the cache holds
keys of the same weights, so they don't change; where they do, identity, version, address and strides tell all but a
write in place through `.data`, `numpy()` or another process, or by a fused optimizer.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from query_experts.layers.caches import cached_tokens
from query_experts.ops.attend import DECODE_TOKENS
from query_experts.ops.select import is_plain_linear, is_unchanged_linear

MOST_BYTES = 16 * 2**20  # of a copy, which is memory: of larger products the calls are less than a tenth (scouting)


@dataclass(frozen=True)
class Packed:
    """What one layer remembers of its last step.

    Attributes:
        cache: the cache of the step.
        parts: the weights and biases then. Held, so that no new tensor takes the place of an old one.
        marks: what is seen of a write to each of them.
        weight: the copy [rows, D]; None before the second step.
        bias: likewise [rows]; None too where there is none.
    """

    cache: weakref.ref[Cache]
    parts: list[Tensor]
    marks: list[Any]
    weight: Tensor | None = None
    bias: Tensor | None = None


# kept apart from the layers, so that copies, pickles and state dicts know none
_last_steps: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def in_one_product(
    layer: nn.Module, layer_idx: int, modules: list[nn.Module], x: Tensor, cache: Cache | None
) -> Tensor | None:
    """x [B, T, D] -> the modules' outputs, joined along the last dim [B, T, rows]; None where each is to be called.

    The weights must be readable past their modules: no hooks, adapters, quantisation, offloading, sharding, gradients.

    Args:
        layer: whose step it is.
        layer_idx: its place in the cache.
        modules: linear maps of x.
        x: hidden states.
        cache: before the new tokens are added.
    """
    if torch.compiler.is_compiling():
        return None
    if cache is None or not _decodes(x) or not all(map(is_unchanged_linear, modules)):
        _last_steps.pop(layer, None)
        return None
    weights, biases = _own(modules, "weight"), _own(modules, "bias")
    parts = weights + biases
    last = _last_steps.get(layer)
    if last is None or last.cache() is not cache or not _same(last.parts, parts) or last.marks != _marks(parts):
        last = None
        if not _fit(modules, weights, biases, x):
            _last_steps.pop(layer, None)
            return None
    if not cached_tokens(cache, layer_idx):  # of a cache that was emptied
        _last_steps.pop(layer, None)
        return None
    if last is None:
        _last_steps[layer] = Packed(weakref.ref(cache, _Forget(layer)), parts, _marks(parts))
        return None
    if last.weight is None:
        last = replace(last, weight=torch.cat(weights), bias=torch.cat(biases) if biases else None)
        _last_steps[layer] = last
    assert last.weight is not None
    return F.linear(x, last.weight, last.bias)


class _Forget:
    """Drops a layer's step with its cache."""

    def __init__(self, layer: nn.Module):
        self.layer = weakref.ref(layer)

    def __call__(self, cache: weakref.ref[Cache]) -> None:
        layer = self.layer()
        last = _last_steps.get(layer) if layer is not None else None
        if layer is not None and last is not None and last.cache is cache:
            del _last_steps[layer]


def _decodes(x: Tensor) -> bool:
    """Whether x is a few tokens of a narrow dtype on a CPU, outside of autograd, autocast and transforms."""
    few = x.is_cpu and x.shape[1] <= DECODE_TOKENS and x.dtype.itemsize == 2 and type(x) is Tensor
    return few and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _fit(modules: list[nn.Module], weights: list[Tensor], biases: list[Tensor], x: Tensor) -> bool:
    """Whether the modules are plain linear maps that fit together into one small product with x."""
    if len(biases) not in (0, len(weights)) or not all(is_plain_linear(module, x.device) for module in modules):
        return False
    if any(t.is_inference() or t.dtype != x.dtype for t in weights + biases):
        return False
    return sum(t.nbytes for t in weights) <= MOST_BYTES


def _own(modules: list[nn.Module], name: str) -> list[Tensor]:
    """The modules' parameters of a name. (Asking a module for an attribute takes it five times as long.)"""
    return [t for module in modules if (t := module._parameters.get(name)) is not None]


def _marks(parts: list[Tensor]) -> list[Any]:
    return [(t.data_ptr(), t._version, t.stride(), t.dtype) for t in parts]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
