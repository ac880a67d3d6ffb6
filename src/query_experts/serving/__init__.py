"""The vLLM plug-in: `vllm serve CHECKPOINT` for GQE checkpoints.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). The model is in `model`, its
attention in `attention`, the rotary embedding in `rotary`; how W_O is cut for tensor parallelism is in `sharding`,
which needs no vLLM.
"""

MODEL = "query_experts.serving.model:VLLMGQEForCausalLM"


def register() -> None:
    """Makes the architecture GQEForCausalLM known to vLLM, and the model type `gqe` to Transformers (on import)."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("GQEForCausalLM", MODEL)
