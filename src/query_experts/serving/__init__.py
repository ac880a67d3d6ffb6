"""The vLLM plug-in: `vllm serve CHECKPOINT` for GQE checkpoints.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). `model` holds the model,
`attention` its attention and `rotary` the rotary embedding. `sharding` splits W_O for tensor parallelism and doesn't
need vLLM.
"""

MODEL = "query_experts.serving.model:VLLMGQEForCausalLM"


def register() -> None:
    """Register the architecture GQEForCausalLM with vLLM; importing the package registered `gqe` with Transformers."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("GQEForCausalLM", MODEL)
