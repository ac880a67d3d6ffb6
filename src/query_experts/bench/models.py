"""Owns what is timed: the arms' attention layers and models, and calls of them for each suite.

Every arm gets the inputs, the cache and the mask that its own model would pass to its layers; masks and rotary angles
are made once outside of the clock, as a model makes them once for all of its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import Cache, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from query_experts.bench.settings import SDPA_BACKENDS, BenchSettings
from query_experts.layers.attention import GQEAttention
from query_experts.layers.masks import causal_mask
from query_experts.model.arms import build
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.initialization import initialise_by_name
from query_experts.model.modeling_gqe import GQESelfAttention
from query_experts.ops.attend import uses_shared_decode

SEED = 0
MOST_SHAPES = 64  # that one compiled subject meets, in the gate above all
Call = Callable[[], Any]


def configured_forward(module: nn.Module, settings: BenchSettings) -> Any:
    """The module's forward with the kernels that are asked for, compiled if that is."""
    forward: Any = module
    for part in module.modules():
        if isinstance(part, GQEAttention):
            part.fused_decode = settings.fused_decode
    if settings.compile:
        # afresh: Dynamo counts recompilations by class, and past its limit would silently run eager
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.reset()
        forward = torch.compile(module, dynamic=False)
    if settings.sdpa_backend is None:
        return forward
    kernel = SDPA_BACKENDS[settings.sdpa_backend]

    def with_kernel(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return forward(*args, **kwargs)

    return with_kernel


class Layer:
    """One attention layer of an arm, with the rotary angles and the mask that its model would pass."""

    def __init__(self, settings: BenchSettings, arm: str, device: str, max_length: int):
        self.config: LlamaConfig = settings.config(arm, max_length)
        self.dtype, self.device = settings.torch_dtype, device
        kind = GQESelfAttention if isinstance(self.config, GQEConfig) else LlamaAttention
        self.module: nn.Module = kind(self.config, 0)
        initialise_by_name(self.module, SEED, std=self.config.hidden_size**-0.5)  # outputs of order 1
        self.module.to(device, self.dtype).eval()
        self.rotary = LlamaRotaryEmbedding(self.config).to(device)
        self.forward = configured_forward(self.module, settings)

    def hidden(self, batch: int, length: int) -> Tensor:
        """Normalised hidden states [B, T, D], the same for every arm."""
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(batch, length, self.config.hidden_size, generator=generator)
        return x.to(self.device, self.dtype)

    def prepare(self, x: Tensor, past: int, cache: Cache | None) -> dict[str, Any]:
        """The layer's other arguments for new tokens x [B, T, D] after `past` cached ones."""
        positions = (torch.arange(x.shape[1], device=self.device) + past)[None]
        if isinstance(self.config, GQEConfig):
            one_read = uses_shared_decode(self.config, x.shape[1], cache)
            mask = causal_mask(self.config, x, None, cache, None, materialise=one_read)
        else:
            mask = create_causal_mask(self.config, x, None, past_key_values=cache)
        return {"position_embeddings": self.rotary(x, position_ids=positions), "attention_mask": mask}

    def prefill(self, batch: int, length: int) -> Call:
        x = self.hidden(batch, length)
        arguments = self.prepare(x, 0, DynamicCache(config=self.config))

        @torch.no_grad()
        def call() -> Tensor:
            return self.forward(x, past_key_values=DynamicCache(config=self.config), **arguments)[0]

        return call

    def cached(self, kind: str, batch: int, cached: int, new: int) -> Call:
        """A call over `new` tokens after `cached` ones; it leaves the cache as it found it."""
        cache: Cache = DynamicCache(config=self.config)
        if kind == "static":
            cache = StaticCache(config=self.config, max_cache_len=cached + new)
        heads, d = self.config.num_key_value_heads, self.config.head_dim
        generator = torch.Generator(self.device).manual_seed(cached)
        for start in range(0, cached, 4096):  # in pieces: the whole in float32 would be twice the cache
            shape = (batch, heads, min(4096, cached - start), d)
            key, value = (torch.randn(shape, generator=generator, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(key, value, 0)
        x = self.hidden(batch, new)
        arguments = self.prepare(x, cached, cache)
        if kind == "static":
            rewind = functools.partial(cache.layers[0].cumulative_length.fill_, cached)
        else:
            rewind = functools.partial(cache.layers[0].crop, -new)

        @torch.no_grad()
        def call() -> Tensor:
            y = self.forward(x, past_key_values=cache, **arguments)[0]
            rewind()
            return y

        return call

    def train(self, batch: int, length: int) -> Call:
        """Forwards and backwards, with gradients of the input and of every parameter."""
        x = self.hidden(batch, length).requires_grad_()
        arguments = self.prepare(x, 0, None)
        cotangent = torch.randn_like(x)

        def call() -> None:
            self.forward(x, **arguments)[0].backward(cotangent)
            x.grad = None
            self.module.zero_grad(set_to_none=True)

        return call


class Model:
    """A whole model of an arm."""

    def __init__(self, settings: BenchSettings, arm: str, device: str, max_length: int):
        self.config = settings.config(arm, max_length)
        self.device = device
        with torch.device(device):
            self.module: PreTrainedModel = build(self.config).to(settings.torch_dtype)
        self.module.set_attn_implementation(settings.attn_implementation)
        initialise_by_name(self.module, SEED, self.config.initializer_range)
        self.forward = configured_forward(self.module, settings)

    def tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.config.vocab_size, (batch, length), generator=generator).to(self.device)

    def prefill(self, batch: int, length: int) -> Call:
        self.module.eval()
        tokens = self.tokens(batch, length)

        @torch.no_grad()
        def call() -> Tensor:
            return self.forward(tokens, use_cache=True, logits_to_keep=1).logits

        return call

    def train(self, batch: int, length: int) -> Call:
        self.module.train()
        tokens = self.tokens(batch, length)

        def call() -> None:
            self.forward(tokens, labels=tokens, use_cache=False).loss.backward()
            self.module.zero_grad(set_to_none=True)  # here, so that what they take is not held before the next call

        return call
