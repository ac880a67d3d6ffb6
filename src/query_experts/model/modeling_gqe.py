"""The GQE language model: Transformers' Llama with its attention replaced, and the router's losses in its loss."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache
from transformers import initialization as init
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from query_experts.layers.attention import GQEAttention
from query_experts.layers.balance import BalanceWindow
from query_experts.layers.masks import causal_mask, padding_mask
from query_experts.layers.router import Router
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.model.router_losses import RouterLosses, predicted_tokens, real_tokens
from query_experts.model.tied import tied_before_sharding
from query_experts.ops.attend import uses_shared_decode
from query_experts.ops.kernels import Kernels


class KeptLogits:
    """Holds router logits past a module of Transformers that drops them: a layer's [B*T, N], or those of all layers.

    Llama's decoder layer drops all but the first output of its attention, and a generic head all outputs of its decoder
    that Llama's doesn't have. A layer's logits stay within one layer call, so activation checkpointing, which reruns a
    layer, treats them as an ordinary output.
    """

    def __init__(self) -> None:
        self.logits: Any = None


class GQESelfAttention(GQEAttention):
    """`GQEAttention` with the arguments and outputs that a Llama decoder layer expects of its attention."""

    def __init__(self, config: GQEConfig, layer_idx: int):
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.active_query_experts,
            config.head_dim,
            config.variant,
            config.output_projection,
            bias=config.attention_bias,
            layer_idx=layer_idx,
            routing=config.routing,
            shared_head_kv=config.shared_head_kv,
            output_bias=config.attention_output_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
            dropout=config.attention_dropout,
            _config=config,
        )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        kept: KeptLogits | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D] and a mask from `causal_mask` -> y [B, T, D], attention weights or None."""
        y, weights, routing = self.route_and_attend(
            hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs
        )
        if kept is not None and routing.logits is not None:
            kept.logits = routing.logits.flatten(2).flatten(0, 1)
        return y, weights


class GQEDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: GQEConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = GQESelfAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *args: Any, output_router_logits: bool = False, **kwargs: Any) -> Any:
        """hidden_states [B, T, D] -> the same; with `output_router_logits`, (hidden_states, router logits [B*T, N])."""
        if not output_router_logits:
            return super().forward(hidden_states, *args, **kwargs)
        kept = KeptLogits()
        return super().forward(hidden_states, *args, kept=kept, **kwargs), kept.logits


class GQEPreTrainedModel(LlamaPreTrainedModel):
    config: GQEConfig
    config_class = GQEConfig
    _no_split_modules = ["GQEDecoderLayer"]  # noqa: RUF012 - as Transformers declares it
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GQEDecoderLayer,
        "attentions": GQESelfAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def maybe_distribute_model(cls, *args: Any) -> Any:
        """As Transformers shards a model while it loads it, with tied embeddings tied before."""
        with tied_before_sharding():
            return super().maybe_distribute_model(*args)

    def set_top_k(self, top_k: int) -> None:
        """Selects another number of experts in each group of every layer, and sets it in the config.

        Raises:
            ValueError: as `GQEAttention.set_top_k`.
        """
        for module in self.modules():
            if isinstance(module, GQEAttention):
                module.set_top_k(top_k)
        self.config.active_query_experts = top_k

    def set_kernels(self, kernels: Kernels) -> None:
        """Runs every layer by `torch`, `triton` or `auto` kernels from now on; not a part of the checkpoint.

        Raises:
            ValueError: as `GQEAttention.set_kernels`.
        """
        for module in self.modules():
            if isinstance(module, GQEAttention):
                module.set_kernels(kernels)


class GQEModel(GQEPreTrainedModel):
    """Llama's decoder over GQE layers."""

    def __init__(self, config: GQEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GQEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3RotaryEmbedding(config=config)  # Llama's, and partial
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        kept: KeptLogits | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Llama's forward with another mask: restarting position_ids always separate documents.

        Under torch.compile with flash attention, nothing checks that all documents begin at the same position.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B or 1, S], nonzero for real tokens, or a prepared 4D mask.
            position_ids: [B or 1, T]; by default they continue from the cached tokens.
            past_key_values: a Transformers cache.
            inputs_embeds: [B, T, D], in place of input_ids.
            use_cache: whether to make a cache where none is given.
            output_router_logits: add `router_logits` to the output: float32 [B*T, N], one tensor per layer.
            kept: where to keep `router_logits` too.

        Raises:
            ValueError: unless exactly one of input_ids and inputs_embeds is given; for a 2D attention_mask with
                another number of rows.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = padding_mask(attention_mask, inputs_embeds.shape[0])
        mask = causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids,
            materialise=uses_shared_decode(self.config, inputs_embeds.shape[1], past_key_values),
        )  # fmt: skip
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]

        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output_router_logits = output_router_logits and self.config.routing != "none"
        router_logits = []
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                output_router_logits=output_router_logits,
                **kwargs,
            )
            if output_router_logits:
                hidden_states, logits = hidden_states
                router_logits.append(logits)
        recorded = tuple(router_logits) if output_router_logits else None
        if kept is not None:
            kept.logits = recorded
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=recorded,
        )


@dataclass
class GQECausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of `GQEForCausalLM`.

    Attributes:
        loss: the training loss: language-model loss and the router's losses.
        lm_loss: the language-model loss only, in nats per token; this is the validation loss.
        aux_loss: the balance loss, summed over layers; only with `output_router_logits`.
        router_logits: float32 [B*T, N], one tensor per layer; only with `output_router_logits`.
    """

    lm_loss: Tensor | None = None


class GQEForCausalLM(RouterLosses, GQEPreTrainedModel, LlamaForCausalLM):
    """The GQE language model. loss = language-model loss + coefficient * balance loss (+ coefficient * z-loss).

    In training the balance loss is that of the global batch, as `RouterLosses` says.
    """

    def __init__(self, config: GQEConfig):
        GQEPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.model = GQEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.balance_window = BalanceWindow()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> GQECausalLMOutput:
        """As Llama's forward, with the router's losses in the loss.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B or 1, S], nonzero for real tokens, or a prepared 4D mask.
            position_ids: [B or 1, T]; where they restart, a new document begins.
            past_key_values: a Transformers cache.
            inputs_embeds: [B, T, D], in place of input_ids.
            labels: [B, T], -100 where a token isn't predicted.
            use_cache: whether to make a cache where none is given.
            logits_to_keep: the last tokens whose logits are computed; 0 for all.
            output_router_logits: add `router_logits` and `aux_loss` to the output.
            num_tokens_in_batch: real tokens in the global batch of this optimizer step, over micro-batches and ranks.

        Raises:
            ValueError: as `GQEModel.forward`; for an attention_mask that leaves out cached keys, where the router's
                losses need it.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routed = self.config.routing != "none" and (labels is not None or output_router_logits)
        tokens = None
        if routed:  # before the cache is updated
            tokens = real_tokens(attention_mask, inputs_embeds if input_ids is None else input_ids, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=routed,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        lm_loss = loss = aux_loss = None
        if labels is not None:
            lm_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = lm_loss.clone()  # the Trainer scales `loss` in place
        if routed:
            items = None if labels is None else predicted_tokens(labels, **kwargs)
            aux_loss, router_loss = self._router_losses(
                outputs.router_logits, tokens, items, kwargs.get("num_items_in_batch"), num_tokens_in_batch
            )
            if loss is not None:
                loss = loss + router_loss.to(loss.device, loss.dtype)

        return GQECausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=aux_loss if output_router_logits else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Llama's; where longrope changes its frequencies, the cache is recomputed, as in Phi-3.

        input_ids [B, T] lacks a prompt that is given as inputs_embeds [B, P, D] alone.
        """
        rope, past, length = self.config.rope_parameters, 0, input_ids.shape[1]
        if rope["rope_type"] == "longrope" and past_key_values is not None:
            past = past_key_values.get_seq_length()
            length = max(length, past + (next_sequence_length or 0))
        if 0 < past <= rope.get("original_max_position_embeddings", 0) < length:
            past_key_values = next_sequence_length = None
            if inputs_embeds is not None:
                later = input_ids[:, input_ids.shape[1] - (length - inputs_embeds.shape[1]) :]
                inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(later)], dim=1)
                is_first_iteration = True  # only then are the embeddings read
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @wraps(LlamaForCausalLM.init_continuous_batching, assigned=(), updated=())
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; `generate_batch` calls it.

        Raises:
            ValueError: before the generating thread starts, where the paged cache can't serve the shared head.
        """
        check_paged_cache(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: GQEConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """The mask that `generate` builds before a compiled step over a static cache."""
        return causal_mask(
            config, inputs_embeds, attention_mask, past_key_values, position_ids,
            materialise=uses_shared_decode(config, inputs_embeds.shape[1], past_key_values),
        )  # fmt: skip


def check_paged_cache(config: GQEConfig) -> None:
    """Raises ValueError unless continuous batching's paged cache can be written once and read by two calls."""
    if config.variant != "gqe":  # without a shared head there is one call
        return
    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        raise ValueError(
            f"transformers is {transformers.__version__}, whose paged cache can't serve the shared head: continuous "
            "batching of variant 'gqe' needs a newer one (5.23 works)"
        )
    backend = config._attn_implementation.removeprefix("paged|")
    if backend == "eager":
        raise ValueError(
            "attn_implementation is 'eager', which writes the paged cache in every call and can't serve the shared "
            "head; continuous batching of variant 'gqe' needs 'sdpa'"
        )


MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gqe"] = "GQEForCausalLM"  # where the Trainer looks before it smooths labels
AutoConfig.register("gqe", GQEConfig, exist_ok=True)
AutoModel.register(GQEConfig, GQEModel, exist_ok=True)
AutoModelForCausalLM.register(GQEConfig, GQEForCausalLM, exist_ok=True)
