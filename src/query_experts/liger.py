"""Liger's kernels for the norms and MLPs of GQE models. Needs liger-kernel and a device that Triton supports."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel


def register() -> None:
    """Lets Liger know GQE models, so that `TrainingArguments(use_liger_kernel=True)` works with any Trainer.

    Liger ignores model types that it doesn't know. `GQETrainer` calls this itself.

    Raises:
        ImportError: without liger-kernel.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ModuleNotFoundError as error:
        raise ImportError("use_liger_kernel is True, which needs Liger: pip install liger-kernel") from error
    MODEL_TYPE_TO_APPLY_LIGER_FN["gqe"] = apply_to_gqe


def check_config(kernel_config: dict[str, Any]) -> None:
    """Raises ValueError for a key of `liger_kernel_config` that `apply_to_gqe` doesn't have: Liger would drop it."""
    known = list(inspect.signature(apply_to_gqe).parameters)[1:]
    if unknown := sorted(kernel_config.keys() - known):
        raise ValueError(f"liger_kernel_config has {unknown[0]}; for a GQE model it must have rms_norm and swiglu only")


def apply_to_gqe(
    model: PreTrainedModel,
    rms_norm: bool = True,
    swiglu: bool = True,
    rope: bool = False,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = False,
) -> None:
    """Gives the norms and MLPs of one model Liger's kernels, and leaves the classes of Transformers as they are.

    So dense models of the same process stay stock Llama. The arguments are the keys of `liger_kernel_config`.

    Args:
        model: a GQE model with any head, or none.
        rms_norm: whether to change the norms before attention, before the MLP and at the end.
        swiglu: whether to change the MLPs.
        rope, cross_entropy, fused_linear_cross_entropy: must be False; they would replace functions that all models
            share, or the model's loss, and with it the router's.

    Raises:
        ValueError: for an argument that must be False, and for `swiglu` with another activation than SiLU.
    """
    refused = {"rope": rope, "cross_entropy": cross_entropy, "fused_linear_cross_entropy": fused_linear_cross_entropy}
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"liger_kernel_config has {name} {value!r}; for a GQE model it must be False or left out, as it would "
                "replace the model's loss or what all models share; rms_norm and swiglu are allowed"
            )
    if swiglu and model.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act is {model.config.hidden_act!r}, and Liger's MLP computes 'silu'; liger_kernel_config must "
            "have swiglu False"
        )
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    decoder = getattr(model, model.base_model_prefix, model)
    if rms_norm:
        _patch_rms_norm_module(decoder.norm)
    for layer in decoder.layers:
        if rms_norm:
            _patch_rms_norm_module(layer.input_layernorm)
            _patch_rms_norm_module(layer.post_attention_layernorm)
        if swiglu:
            _patch_swiglu_module(layer.mlp, LigerSwiGLUMLP)
