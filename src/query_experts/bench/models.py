"""What is timed: the attention layer and the model of each arm, and their calls in each suite.

Every arm gets the inputs, the cache and the mask that its own model passes to its layers. Masks and rotary angles are
made outside of the timed call, since a model makes them once for all of its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import Cache, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from query_experts.bench.results import STOCK
from query_experts.bench.settings import SDPA_BACKENDS, BenchSettings
from query_experts.common.timing import Call
from query_experts.layers.masks import causal_mask
from query_experts.model.arms import build
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.initialization import initialise_by_name
from query_experts.model.kernel_choice import kernel_choice, use_kernels
from query_experts.model.modeling_gqe import GQESelfAttention
from query_experts.ops.attend import uses_shared_decode

SEED = 0
MOST_SHAPES = 64  # that one compiled module meets; the correctness check has the most


def configured_forward(module: nn.Module, settings: BenchSettings) -> Callable[..., Any]:
    """The module's forward with the kernels of the settings, compiled if they ask for it."""
    forward: Callable[..., Any] = module
    use_kernels(module, settings.kernels)
    if settings.compile:
        # Dynamo counts recompilations by class; past its limit it runs eager without an error
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


@dataclass(frozen=True)
class AttentionInputs:
    """What a model passes to each of its attention layers, except for hidden states and the cache."""

    cos_sin: tuple[Tensor, Tensor]  # [1, T, d] each
    mask: Any  # a tensor, a BlockMask of FlexAttention, or None


class Layer:
    """One attention layer of an arm, with the rotary angles and the mask that its model passes."""

    def __init__(self, settings: BenchSettings, arm: str, device: str, max_length: int):
        self.config: LlamaConfig = settings.config(arm, max_length)
        self.dtype, self.device = settings.torch_dtype, device
        kind = GQESelfAttention if isinstance(self.config, GQEConfig) else LlamaAttention
        self.module: nn.Module = kind(self.config, 0)
        initialise_by_name(self.module, SEED, std=self.config.hidden_size**-0.5)  # outputs of order 1
        self.module.to(device, self.dtype).eval()
        self.rotary = LlamaRotaryEmbedding(self.config).to(device)
        self._forward = configured_forward(self.module, settings)

    @property
    def kernels(self) -> str:
        """What computes the layer: stock (Transformers' Llama), torch or triton."""
        choice = kernel_choice(self.module)
        return STOCK if choice is None else choice.chosen

    def hidden(self, batch: int, length: int) -> Tensor:
        """Normalised hidden states [B, T, D], the same for every arm."""
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(batch, length, self.config.hidden_size, generator=generator)
        return x.to(self.device, self.dtype)

    def inputs(self, x: Tensor, past: int, cache: Cache | None) -> AttentionInputs:
        """The layer's other inputs for new tokens x [B, T, D] after `past` cached ones."""
        positions = (torch.arange(x.shape[1], device=self.device) + past)[None]
        if isinstance(self.config, GQEConfig):
            shared = uses_shared_decode(self.config, x.shape[1], cache)
            mask = causal_mask(self.config, x, None, cache, None, materialise=shared)
        else:
            mask = create_causal_mask(self.config, x, None, past_key_values=cache)
        return AttentionInputs(self.rotary(x, position_ids=positions), mask)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: Cache | None = None) -> Tensor:
        """x [B, T, D] -> the layer's output [B, T, D]."""
        return self._forward(
            x, position_embeddings=inputs.cos_sin, attention_mask=inputs.mask, past_key_values=cache
        )[0]  # fmt: skip

    def prefill(self, batch: int, length: int) -> Callable[[], Tensor]:
        x = self.hidden(batch, length)
        inputs = self.inputs(x, 0, DynamicCache(config=self.config))

        @torch.no_grad()
        def call() -> Tensor:
            return self.forward(x, inputs, DynamicCache(config=self.config))

        return call

    def cached(self, kind: str, batch: int, cached: int, new: int) -> Callable[[], Tensor]:
        """A call over `new` tokens after `cached` ones; it leaves the cache unchanged."""
        cache = self._filled_cache(kind, batch, cached, new)
        x = self.hidden(batch, new)
        inputs = self.inputs(x, cached, cache)
        if kind == "static":
            rewind = functools.partial(cache.layers[0].cumulative_length.fill_, cached)
        else:
            rewind = functools.partial(cache.layers[0].crop, -new)

        @torch.no_grad()
        def call() -> Tensor:
            y = self.forward(x, inputs, cache)
            rewind()
            return y

        return call

    def _filled_cache(self, kind: str, batch: int, cached: int, new: int) -> Cache:
        cache: Cache = DynamicCache(config=self.config)
        if kind == "static":
            cache = StaticCache(config=self.config, max_cache_len=cached + new)
        heads, d = self.config.num_key_value_heads, self.config.head_dim
        generator = torch.Generator(self.device).manual_seed(cached)
        for start in range(0, cached, 4096):  # in pieces, since the whole in float32 takes twice the cache's memory
            shape = (batch, heads, min(4096, cached - start), d)
            key, value = (torch.randn(shape, generator=generator, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(key, value, 0)
        return cache

    def train(self, batch: int, length: int) -> Call:
        """A forward and a backward pass, with gradients of the input and of every parameter."""
        x = self.hidden(batch, length).requires_grad_()
        inputs = self.inputs(x, 0, None)
        cotangent = torch.randn_like(x)

        def call() -> None:
            self.forward(x, inputs).backward(cotangent)
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

    def prefill(self, batch: int, length: int) -> Callable[[], Tensor]:
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
            self.module.zero_grad(set_to_none=True)  # frees the gradients before the next call

        return call
