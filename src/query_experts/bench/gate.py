"""Owns the check that stands before every speed: each arm's fast call errs little more than a plain one.

Both are held against the same layer in float64 with eager attention. The plain one is eager attention in the
benchmark's dtype, for decoding over the whole prompt at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from query_experts.bench.settings import BenchSettings
from query_experts.bench.subjects import Layer

LENGTH = 333  # odd, and beyond one block of every kernel
ALLOWED = 2.0  # times the plain error
ROUNDING = 4  # machine epsilons: where the plain run is exact by chance, this much is no fault


@dataclass(frozen=True)
class Check:
    """Largest errors of the fast and of the plain call against float64."""

    arm: str
    what: str
    error: float
    plain: float
    passed: bool


def check_layer(layer: Layer, arm: str, settings: BenchSettings) -> list[Check]:
    """Prefill, and the last three tokens after a static and a dynamic cache."""
    x = layer.hidden(2, LENGTH)
    exact = _eager(layer, x, torch.float64).double()
    plain = _eager(layer, x, layer.dtype).double()
    new = 3
    found = {
        "prefill": (_fast(layer, x, DynamicCache(config=layer.config), [LENGTH]), slice(None)),
        "decode, dynamic cache": (
            _fast(layer, x, DynamicCache(config=layer.config), [LENGTH - new, new]), slice(-new, None)
        ),
        "decode, static cache": (
            _fast(layer, x, StaticCache(config=layer.config, max_cache_len=LENGTH + 7), [LENGTH - new, *[1] * new]),
            slice(-new, None),
        ),
    }  # fmt: skip
    checks = []
    for what, (y, part) in found.items():
        error, usual = (float((t[:, part] - exact[:, part]).abs().max()) for t in (y.double(), plain))
        scale = float(exact.abs().max()) * torch.finfo(layer.dtype).eps * ROUNDING
        checks.append(Check(arm, what, error, usual, error <= max(ALLOWED * usual, scale)))
    return checks


@torch.no_grad()
def _fast(layer: Layer, x: Tensor, cache: Any, pieces: list[int]) -> Tensor:
    """Outputs [B, T, D] of x given piece by piece."""
    outputs, past = [], 0
    for size in pieces:
        piece = x[:, past : past + size]
        arguments = layer.prepare(piece, past, cache)
        outputs.append(layer.forward(piece, past_key_values=cache, **arguments)[0])
        past += size
    return torch.cat(outputs, 1)


@torch.no_grad()
def _eager(layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same layer, its values and its input, in `dtype` with eager attention in one pass."""
    module: nn.Module = copy.deepcopy(layer.module).to(dtype)
    config = copy.deepcopy(layer.config)
    config._attn_implementation = "eager"
    for part in module.modules():
        if hasattr(part, "config"):
            part.config = config
    positions = torch.arange(x.shape[1], device=x.device)[None]
    cos, sin = layer.rotary(x, position_ids=positions)  # rounded to the benchmark's dtype, as the fast call has them
    T = x.shape[1]
    lowest = max(torch.finfo(t).min for t in (dtype, torch.float32))  # eager takes its softmax in float32
    mask = torch.full((T, T), lowest, dtype=dtype, device=x.device).triu(1)[None, None]
    return module(x.to(dtype), position_embeddings=(cos.to(dtype), sin.to(dtype)), attention_mask=mask)[0]
