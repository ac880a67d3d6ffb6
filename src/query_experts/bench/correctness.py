"""Owns the check that stands before every speed: each arm's fast calls err little more than a plain one.

All are held against float64: dense against its own eager attention, the others against the definition of the layer,
written out here with nothing of the layer but its weights. The plain call is eager attention in the benchmark's dtype,
over the whole prompt at once.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache

from query_experts.bench.models import Layer
from query_experts.layers.attention import GQEAttention

LENGTH = 333  # odd, and beyond one block of every kernel
ALLOWED = 2.0  # times the plain error
LEAST, MOST = 4, 32  # machine epsilons of the largest number: what is no fault, and what always is one


@dataclass(frozen=True)
class Check:
    """Largest errors of the fast and of the plain call against float64."""

    arm: str
    what: str
    error: float
    plain: float
    passed: bool


def check_layer(layer: Layer, arm: str, suites: Collection[str]) -> Iterator[Check]:
    """Prefill, and every other way in which the suites call a layer: chunks, decoding over both caches, training."""
    trains = not {"train", "model-train"}.isdisjoint(suites)
    x, cotangent = layer.hidden(2, LENGTH), layer.hidden(2, LENGTH + 1)[:, 1:]
    exact, exact_gradients = _forwards_and_back(_In(layer, torch.float64), x.double(), cotangent)
    plain, plain_gradients = _forwards_and_back(_In(layer, layer.dtype), x, cotangent)
    ways: dict[str, tuple[Cache, list[int]]] = {"prefill": (DynamicCache(config=layer.config), [LENGTH])}
    if "chunk" in suites:
        ways["a chunk"] = DynamicCache(config=layer.config), [LENGTH - 101, 101]
    if "decode" in suites:
        static = StaticCache(config=layer.config, max_cache_len=LENGTH + 7)
        ways["decoding, dynamic cache"] = DynamicCache(config=layer.config), [LENGTH - 4, 3, 1]
        ways["decoding, static cache"] = static, [LENGTH - 3, 1, 1, 1]
        # for one token in all the layer may take another way
        ways["decoding one sequence"] = DynamicCache(config=layer.config), [LENGTH - 2, 1, 1]
    for what, (cache, pieces) in ways.items():
        rows = slice(1 if what == "decoding one sequence" else None)
        y = _fast(layer, x[rows], cache, pieces)
        new = slice(pieces[0] if len(pieces) > 1 else 0, None)
        yield _compare(arm, what, y[:, new], plain[rows, new], exact[rows, new])
    if not trains:
        return
    arguments = layer.prepare(x, 0, None)
    _, gradients = _forwards_and_back(lambda x: layer.forward(x, **arguments)[0], x, cotangent, layer.module)
    for name, exact_gradient in exact_gradients.items():
        yield _compare(arm, f"the gradient of {name}", gradients[name], plain_gradients[name], exact_gradient)


def _compare(arm: str, what: str, y: Tensor, plain: Tensor, exact: Tensor) -> Check:
    error, usual = (float((t.double() - exact).abs().max()) for t in (y, plain))
    rounding = float(exact.abs().max()) * torch.finfo(y.dtype).eps
    return Check(arm, what, error, usual, error <= min(max(ALLOWED * usual, LEAST * rounding), MOST * rounding))


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


class _In(nn.Module):
    """A copy of the layer in a dtype, with eager attention over the whole of x; GQE in float64 by its definition."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        super().__init__()
        self.module = copy.deepcopy(layer.module).to(dtype)
        config = copy.deepcopy(layer.config)
        config._attn_implementation = "eager"
        for part in self.module.modules():
            if hasattr(part, "config"):
                part.config = config
        positions = torch.arange(LENGTH, device=layer.device)[None]
        cos_sin = layer.rotary(torch.empty(0, dtype=layer.dtype, device=layer.device), position_ids=positions)
        self.cos_sin = [t.to(dtype) for t in cos_sin]  # rounded to the benchmark's dtype, as the fast call has them
        self.by_definition = dtype == torch.float64 and isinstance(self.module, GQEAttention)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        if self.by_definition:
            return defined(self.module, x, *self.cos_sin)
        lowest = max(torch.finfo(t).min for t in (x.dtype, torch.float32))  # eager takes its softmax in float32
        mask = torch.full((T, T), lowest, dtype=x.dtype, device=x.device).triu(1)[None, None]
        return self.module(x, position_embeddings=tuple(self.cos_sin), attention_mask=mask)[0]


def defined(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """arXiv 2606.20945, section 3: all N heads attend, and the woken ones' outputs [B, T, d] become slots.

    x [B, T, D], cos and sin [1, T, d] -> y [B, T, D]. For the variant gqe, in x's dtype.
    """
    B, T, _ = x.shape
    G, k, d = layer.num_kv_heads, layer.top_k, layer.head_dim
    M = layer.experts_per_group

    def rotated(rows: Tensor) -> Tensor:  # [B, T, heads, d]
        half = torch.cat([-rows[..., d // 2 :], rows[..., : d // 2]], -1)
        return rows * cos[:, :, None] + half * sin[:, :, None]

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, T, d] each
        scores = (query @ key.mT * d**-0.5).masked_fill(torch.ones(T, T, device=x.device).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ value

    query, shared_query = rotated(layer.q_proj(x).view(B, T, G * M, d)), rotated(layer.q_shared(x).view(B, T, 1, d))
    key, value = rotated(layer.k_proj(x).view(B, T, G, d)), layer.v_proj(x).view(B, T, G, d)
    heads = torch.stack([attended(query[:, :, n], key[:, :, n // M], value[:, :, n // M]) for n in range(G * M)], 2)
    shared = attended(shared_query[:, :, 0], key.mean(2), value.mean(2))

    if layer.router is None:
        probs, order = x.new_full((B, T, G, M), 1 / M), torch.arange(M, device=x.device).expand(B, T, G, M)
    else:
        probs = F.linear(x, layer.router.weight).view(B, T, G, M).softmax(-1)
        order = probs.argsort(stable=True, dim=-1, descending=True)
    woken = F.one_hot(order[..., :k], M).to(x.dtype)  # [B, T, G, k, M]
    slots = torch.einsum("btgkm,btgmd->btgkd", woken, heads.view(B, T, G, M, d))
    chosen = torch.einsum("btgkm,btgm->btgk", woken, probs)
    weighted = torch.einsum("btgk,btgkd->btd", chosen / chosen.sum((2, 3), keepdim=True), slots)
    if layer.output_projection == "expert":
        slots = torch.einsum("btgkm,btgkd->btgmd", woken, slots)
    return layer.o_proj(torch.cat([slots.flatten(2), weighted, shared], -1))


def _forwards_and_back(
    call: Any, x: Tensor, cotangent: Tensor, module: nn.Module | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs [B, T, D], and the gradients of x and of every weight of the layer."""
    weights = dict((module if module is not None else call.module).named_parameters())
    x = x.detach().requires_grad_()
    y = call(x)
    gradients = torch.autograd.grad(y, [x, *weights.values()], cotangent.to(y.dtype))
    return y.detach(), dict(zip(["x", *weights], gradients, strict=True))
