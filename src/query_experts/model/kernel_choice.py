"""`kernels` as a setting of commands: what is refused, how a model uses it, and what it chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from query_experts.common.errors import SettingError
from query_experts.common.fields import option
from query_experts.layers.attention import GQEAttention
from query_experts.model.configuration_gqe import GQEConfig
from query_experts.ops.kernels import Kernels as Kernels
from query_experts.ops.kernels import measured_on, no_triton_on, not_covered

HELP = "of GQE layers: torch, on any device; triton, fused, for NVIDIA GPUs; auto: triton only on GPUs where measured"


def kernels_option(group: str) -> Any:
    """The setting `kernels`, under a heading of the help page."""
    return option("auto", HELP, group)


@dataclass(frozen=True)
class KernelChoice:
    """The setting `kernels`, and what computed for it: torch or triton."""

    asked: str
    chosen: str


def check_kernels_setting(kernels: str, device: str, configs: Iterable[LlamaConfig] = ()) -> None:
    """Raises SettingError for `triton` where a device, or the layout of one of the configurations, can't have it."""
    if kernels != "triton":
        return
    layouts = [
        SimpleNamespace(
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            experts_per_group=config.num_attention_heads // config.num_key_value_heads,
            is_group_parallel=False,
        )
        for config in configs
        if isinstance(config, GQEConfig)
    ]
    reasons = [no_triton_on(torch.device(device)), *map(not_covered, layouts)]
    if reason := next(filter(None, reasons), None):
        raise SettingError(f"kernels is 'triton', which {reason}; it must be torch or auto")


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Sets the kernels of every GQE layer, if there are any. Raises SettingError where a layout can't have them."""
    for layer in gqe_layers(model):
        try:
            layer.set_kernels(kernels)
        except ValueError as error:
            raise SettingError(str(error)) from error


def kernel_choice(model: nn.Module) -> KernelChoice | None:
    """What the model's GQE layers were set to and what computes them, where they are; None for a stock model."""
    layers = gqe_layers(model)
    if not layers:
        return None
    asked = layers[0].kernels
    device = next(model.parameters()).device
    triton = asked == "triton" or (asked == "auto" and measured_on(device) and not any(map(not_covered, layers)))
    return KernelChoice(asked, "triton" if triton else "torch")


def gqe_layers(model: nn.Module) -> list[GQEAttention]:
    return [module for module in model.modules() if isinstance(module, GQEAttention)]
