"""The GQE language model for vLLM: vLLM's Llama with its attention replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from query_experts.serving.attention import GQEAttention
from query_experts.serving.sharding import deal_output_rows


class GQEDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=GQEAttention)


class GQEForCausalLM(LlamaForCausalLM):
    """Serves what `query_experts.GQEForCausalLM` saves.

    Raises ValueError for LoRA adapters over several tensor-parallel ranks: vLLM would cut the adapter of o_proj by
    slots, which is not how the ranks hold them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        self.ranks = get_tensor_model_parallel_world_size()
        if vllm_config.lora_config is not None and self.ranks > 1:
            raise ValueError(f"tensor_parallel_size is {self.ranks}; with LoRA adapters a GQE model needs 1")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=GQEDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """weights: names and tensors as in the checkpoint. -> the names of the parameters that were loaded."""
        return super().load_weights((name, self._as_ranks_hold_it(name, tensor)) for name, tensor in weights)

    def _as_ranks_hold_it(self, name: str, tensor: Tensor) -> Tensor:
        if self.config.variant == "gqe" and self.ranks > 1 and name.endswith("o_proj.weight"):
            return deal_output_rows(tensor, self.config.head_dim, self.ranks)
        return tensor
