"""The GQE language model for vLLM: vLLM's Llama with its attention replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from query_experts.model.configuration_gqe import GQEConfig
from query_experts.serving.attention import VLLMGQEAttention
from query_experts.serving.sharding import output_rows, shard_for_ranks

FOREIGN = {"sliding_window": None, "logit_scale": 1.0, "is_causal": True}  # vLLM obeys them; by default they do nothing


class VLLMGQEDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=VLLMGQEAttention)


class VLLMGQEForCausalLM(LlamaForCausalLM):
    """Serves what `query_experts.GQEForCausalLM` saves.

    Raises ValueError for a configuration that can't be built or that vLLM would read otherwise than Transformers, and
    for LoRA adapters over several tensor-parallel ranks: vLLM would cut the adapter of o_proj by slots, which is not
    how the ranks hold them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_config(vllm_config.model_config.hf_config)
        self.ranks = get_tensor_model_parallel_world_size()
        if vllm_config.lora_config is not None and self.ranks > 1:
            raise ValueError(f"tensor_parallel_size is {self.ranks}; with LoRA adapters a GQE model needs 1")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=VLLMGQEDecoderLayer)
        self.quantised = vllm_config.quant_config is not None
        # not of dummy weights: what loads later, in whatever pieces, is an update
        self.must_load_all = vllm_config.load_config.load_format != "dummy" and not self.quantised

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """weights: names and tensors as in the checkpoint. -> the names of the parameters that were loaded.

        Raises ValueError for a tensor that doesn't fit, or one that is missing the first time: vLLM itself doesn't miss
        those of linear maps, and would serve whatever memory held. (Of quantised weights it does.)
        """
        seen: set[str] = set()
        loaded = super().load_weights(self._sharded_for_ranks(weights, seen))
        missing = self._names_in_checkpoint() - seen if self.must_load_all else None
        if missing:
            named = ", ".join(sorted(missing)[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(f"checkpoint lacks {named}; it must hold every tensor of the model")
        self.must_load_all = False
        return loaded

    def _sharded_for_ranks(self, weights: Iterable[tuple[str, Tensor]], seen: set[str]) -> Iterable[tuple[str, Tensor]]:
        rows = output_rows(self.config)
        for name, tensor in weights:
            seen.add(name)
            if name.endswith(".o_proj.weight") and not self.quantised and tensor.shape[-1] != rows:
                raise ValueError(
                    f"{name} is {list(tensor.shape)}; with active_query_experts {self.config.active_query_experts}, "
                    f"variant {self.config.variant!r} and output_projection {self.config.output_projection!r} it must "
                    f"be [{self.config.hidden_size}, {rows}]"
                )
            if ".o_proj." in name and self.config.variant == "gqe" and self.ranks > 1:
                tensor = shard_for_ranks(name, tensor, self.config, self.ranks)
            yield name, tensor

    def _names_in_checkpoint(self) -> set[str]:
        """Of this rank's own parameters, those that vLLM joins apart again."""
        names = set()
        for parameter, _ in self.named_parameters():
            *path, module, kind = parameter.split(".")
            if path[:1] == ["model"] or module == "lm_head":
                names |= {".".join([*path, part, kind]) for part in self.packed_modules_mapping.get(module, [module])}
        return names


def check_config(config: GQEConfig) -> None:
    """Raises ValueError for what `--hf-overrides` made of it, and for fields that are Llama's in vLLM alone."""
    config.validate_architecture()
    for name, neutral in FOREIGN.items():
        held = getattr(config, name, neutral)
        if held != neutral:
            raise ValueError(f"{name} is {held!r}; GQE has no such field, so it must be left out, or {neutral!r}")
