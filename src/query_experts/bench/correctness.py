"""Checks each arm before its speed is measured: the error of the timed calls is little more than that of a plain call.

Errors are against float64: of dense and dense-fused against Llama's eager attention, of the other arms against the
paper's definition of the layer, which is written out here and uses only the layer's weights. The plain call is eager
attention in the benchmark's dtype, by kernels torch, over the whole prompt at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from query_experts.bench.models import Layer
from query_experts.bench.results import Check
from query_experts.layers.attention import GQEAttention

LENGTH = 333  # odd, and longer than one block of every kernel
ALLOWED = 2.0  # times the plain error
LEAST, MOST = 4, 32  # machine epsilons of the largest number: an error below always passes, one above never does


@dataclass(frozen=True)
class Way:
    """One way of calling a layer over LENGTH tokens: piece by piece, into a cache."""

    what: str
    cache: Cache
    pieces: list[int]  # tokens of each call
    batch: int = 2

    @property
    def new(self) -> slice:
        """The tokens that are compared: those after the first piece, or all of a single piece."""
        return slice(self.pieces[0] if len(self.pieces) > 1 else 0, None)


def check_layer(layer: Layer, arm: str, suites: Collection[str]) -> Iterator[Check]:
    """Checks prefill, and every other way in which the suites call a layer: chunks, decoding, training."""
    x, cotangent = layer.hidden(2, LENGTH), layer.hidden(2, LENGTH + 1)[:, 1:]
    exact, exact_gradients = _PlainLayer(layer, torch.float64).outputs_and_gradients(x.double(), cotangent)
    plain, plain_gradients = _PlainLayer(layer, layer.dtype).outputs_and_gradients(x, cotangent)
    for way in _ways(layer.config, suites):
        rows = slice(way.batch)
        y = _outputs(layer, x[rows], way)
        yield _compare(arm, way.what, y[:, way.new], plain[rows, way.new], exact[rows, way.new])
    if {"train", "model-train"}.isdisjoint(suites):
        return
    inputs = layer.inputs(x, 0, None)
    _, gradients = _outputs_and_gradients(lambda x: layer.forward(x, inputs), layer.module, x, cotangent)
    for name, exact_gradient in exact_gradients.items():
        yield _compare(arm, f"the gradient of {name}", gradients[name], plain_gradients[name], exact_gradient)


def _ways(config: LlamaConfig, suites: Collection[str]) -> Iterator[Way]:
    yield Way("prefill", DynamicCache(config=config), [LENGTH])
    if "chunk" in suites:
        yield Way("a chunk", DynamicCache(config=config), [LENGTH - 101, 101])
    if "decode" in suites:
        yield Way("decoding, dynamic cache", DynamicCache(config=config), [LENGTH - 4, 3, 1])
        static = StaticCache(config=config, max_cache_len=LENGTH + 7)
        yield Way("decoding, static cache", static, [LENGTH - 3, 1, 1, 1])
        # the layer may compute a single token differently from a batch of them
        yield Way("decoding one sequence", DynamicCache(config=config), [LENGTH - 2, 1, 1], batch=1)


def _compare(arm: str, what: str, y: Tensor, plain: Tensor, exact: Tensor) -> Check:
    error, plain_error = (float((t.double() - exact).abs().max()) for t in (y, plain))
    rounding = float(exact.abs().max()) * torch.finfo(y.dtype).eps
    passed = error <= min(max(ALLOWED * plain_error, LEAST * rounding), MOST * rounding)
    return Check(arm, what, error, plain_error, passed)


@torch.no_grad()
def _outputs(layer: Layer, x: Tensor, way: Way) -> Tensor:
    """Outputs [B, T, D] of x given piece by piece."""
    outputs, past = [], 0
    for size in way.pieces:
        piece = x[:, past : past + size]
        inputs = layer.inputs(piece, past, way.cache)
        outputs.append(layer.forward(piece, inputs, way.cache))
        past += size
    return torch.cat(outputs, 1)


class _PlainLayer(nn.Module):
    """A copy of a layer in a dtype, with eager attention over the whole of x; GQE in float64 by its definition.

    Where the layer is dense attention, that of Llama with its weights.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype):
        super().__init__()
        self.module = _plain_module(layer).to(dtype)
        config = copy.deepcopy(layer.config)
        config._attn_implementation = "eager"
        for part in self.module.modules():
            if hasattr(part, "config"):
                part.config = config
        positions = torch.arange(LENGTH, device=layer.device)[None]
        cos_sin = layer.rotary(torch.empty(0, dtype=layer.dtype, device=layer.device), position_ids=positions)
        self.cos_sin = [t.to(dtype) for t in cos_sin]  # rounded to the benchmark's dtype, as the timed call has them
        self.by_definition = dtype == torch.float64 and isinstance(self.module, GQEAttention)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        if self.by_definition:
            return layer_by_definition(self.module, x, *self.cos_sin)
        lowest = max(torch.finfo(t).min for t in (x.dtype, torch.float32))  # eager computes its softmax in float32
        mask = torch.full((T, T), lowest, dtype=x.dtype, device=x.device).triu(1)[None, None]
        return self.module(x, position_embeddings=tuple(self.cos_sin), attention_mask=mask)[0]

    def outputs_and_gradients(self, x: Tensor, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return _outputs_and_gradients(self, self.module, x, cotangent)


def _plain_module(layer: Layer) -> nn.Module:
    module = layer.module
    if not isinstance(module, GQEAttention):
        return copy.deepcopy(module)
    if module.routing == "none" and module.variant == "hard_concat":
        llama = LlamaAttention(layer.config, 0).to(layer.device)
        llama.load_state_dict(module.state_dict())
        return llama.eval()
    plain = copy.deepcopy(module)
    plain.set_kernels("torch")
    return plain


def layer_by_definition(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """arXiv 2606.20945, section 3: all N heads attend, and the outputs of the selected experts become slots.

    Args:
        layer: A GQEAttention of the variant gqe, for its weights and sizes.
        x: Hidden states [B, T, D].
        cos: Of the rotary embedding, [1, T, d].
        sin: Of the rotary embedding, [1, T, d].

    Returns:
        Outputs [B, T, D] in the dtype of x.
    """
    B, T, _ = x.shape
    G, M, d = layer.num_kv_heads, layer.experts_per_group, layer.head_dim
    query = _rotate(layer.q_proj(x).view(B, T, G * M, d), cos, sin)
    shared_query = _rotate(layer.q_shared(x).view(B, T, 1, d), cos, sin)
    key, value = _rotate(layer.k_proj(x).view(B, T, G, d), cos, sin), layer.v_proj(x).view(B, T, G, d)
    heads = torch.stack([_attend(query[:, :, n], key[:, :, n // M], value[:, :, n // M]) for n in range(G * M)], 2)
    shared = _attend(shared_query[:, :, 0], key.mean(2), value.mean(2))

    probs, selected = _route(layer, x)
    slots = torch.einsum("btgkm,btgmd->btgkd", selected, heads.view(B, T, G, M, d))
    scores = torch.einsum("btgkm,btgm->btgk", selected, probs)
    weighted = torch.einsum("btgk,btgkd->btd", scores / scores.sum((2, 3), keepdim=True), slots)
    if layer.output_projection == "expert":
        slots = torch.einsum("btgkm,btgkd->btgmd", selected, slots)
    return layer.o_proj(torch.cat([slots.flatten(2), weighted, shared], -1))


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, T, heads, d] in Llama's half-rotation form."""
    first, second = rows.chunk(2, -1)
    return rows * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one head; all [B, T, d]."""
    _, T, d = query.shape
    future = torch.ones(T, T, device=query.device).triu(1).bool()
    return (query @ key.mT * d**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ value


def _route(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B, T, G, M] and the selected experts as one-hot rows [B, T, G, k, M]."""
    B, T, _ = x.shape
    G, M, k = layer.num_kv_heads, layer.experts_per_group, layer.top_k
    if layer.router is None:
        probs, order = x.new_full((B, T, G, M), 1 / M), torch.arange(M, device=x.device).expand(B, T, G, M)
    else:
        logits = F.linear(x, layer.router.weight).view(B, T, G, M)
        probs, order = logits.softmax(-1), logits.argsort(stable=True, dim=-1, descending=True)
    return probs, F.one_hot(order[..., :k], M).to(x.dtype)


def _outputs_and_gradients(
    call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs [B, T, D], and the gradients of x and of every weight of the module."""
    weights = dict(module.named_parameters())
    x = x.detach().requires_grad_()
    y = call(x)
    gradients = torch.autograd.grad(y, [x, *weights.values()], cotangent.to(y.dtype))
    return y.detach(), dict(zip(["x", *weights], gradients, strict=True))
