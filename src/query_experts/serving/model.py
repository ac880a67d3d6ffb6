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
from query_experts.serving.sharding import output_projection_width, shard_for_ranks

# fields of Llama that vLLM obeys and GQE doesn't have -> the value without effect
UNSUPPORTED_FIELDS = {"logit_scale": 1.0, "is_causal": True}


class VLLMGQEDecoderLayer(LlamaDecoderLayer):
    """vLLM's Llama layer with GQE attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=VLLMGQEAttention)


class VLLMGQEForCausalLM(LlamaForCausalLM):
    """Serves what `query_experts.GQEForCausalLM` saves.

    Raises ValueError for a configuration that can't be built, or that vLLM would read differently from Transformers.
    Raises it too for LoRA adapters with several tensor-parallel ranks: vLLM would split the adapter of o_proj evenly,
    but the ranks' columns are arranged otherwise.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_config(vllm_config.model_config.hf_config)
        self.ranks = get_tensor_model_parallel_world_size()
        if vllm_config.lora_config is not None and self.ranks > 1:
            raise ValueError(f"tensor_parallel_size is {self.ranks}; with LoRA adapters a GQE model needs 1")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=VLLMGQEDecoderLayer)
        self.quantised = vllm_config.quant_config is not None
        # after dummy weights, real ones come as updates, in parts
        self.must_load_all = vllm_config.load_config.load_format != "dummy" and not self.quantised

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights, by their names in the checkpoint. -> the names of the loaded parameters.

        Raises ValueError for a tensor that doesn't fit, and for one that is missing in the first call. vLLM itself
        notices neither for linear maps, and would serve uninitialised memory. (It notices them in quantised weights.)
        """
        found: set[str] = set()
        loaded = super().load_weights(self._sharded_for_ranks(weights, found))
        missing = self._names_in_checkpoint() - found if self.must_load_all else None
        if missing:
            names = ", ".join(sorted(missing)[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(f"checkpoint lacks {names}; it must hold every tensor of the model")
        self.must_load_all = False
        return loaded

    def _sharded_for_ranks(
        self, weights: Iterable[tuple[str, Tensor]], found: set[str]
    ) -> Iterable[tuple[str, Tensor]]:
        """The weights with o_proj arranged for the ranks; adds their names to `found`."""
        width = output_projection_width(self.config)
        for name, tensor in weights:
            found.add(name)
            if name.endswith(".o_proj.weight") and not self.quantised and tensor.shape[-1] != width:
                raise ValueError(
                    f"{name} is {list(tensor.shape)}; with active_query_experts {self.config.active_query_experts}, "
                    f"variant {self.config.variant!r} and output_projection {self.config.output_projection!r} it must "
                    f"be [{self.config.hidden_size}, {width}]"
                )
            if ".o_proj." in name and self.config.variant == "gqe" and self.ranks > 1:
                tensor = shard_for_ranks(name, tensor, self.config, self.ranks)
            yield name, tensor

    def _names_in_checkpoint(self) -> set[str]:
        """The names in the checkpoint of this rank's parameters; vLLM fuses some of them into one."""
        names = set()
        for parameter, _ in self.named_parameters():
            *path, module, kind = parameter.split(".")
            if path[:1] == ["model"] or module == "lm_head":
                names |= {".".join([*path, part, kind]) for part in self.packed_modules_mapping.get(module, [module])}
        return names


def check_config(config: GQEConfig) -> None:
    """Raises ValueError for values that don't fit, as from `--hf-overrides`, and fields that only vLLM would obey."""
    config.validate_architecture()
    for name, neutral in UNSUPPORTED_FIELDS.items():
        value = getattr(config, name, neutral)
        if value != neutral:
            raise ValueError(f"{name} is {value!r}; GQE has no such field, so it must be left out, or {neutral!r}")
