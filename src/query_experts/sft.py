"""TRL's SFTTrainer for GQE models: its data, packing and adapters, with the model's own loss. Needs trl."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

try:
    from trl import SFTTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError("query_experts.sft needs TRL: pip install trl") from error

from query_experts.training import GQETrainer


class _OwnLossSFTTrainer(SFTTrainer):
    """SFTTrainer with the loss that the model returns.

    TRL's own loss bypasses the model's `forward`, and its balance loss expects one list of experts per layer, as in
    Mixtral.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, return_outputs, num_items_in_batch)


class GQESFTTrainer(GQETrainer, _OwnLossSFTTrainer):
    """TRL's SFTTrainer with the loss of `GQEForCausalLM`; logs it as `GQETrainer` does.

    It doesn't log TRL's metrics of the loss: entropy, mean_token_accuracy, num_tokens.

    Args:
        *args: as for SFTTrainer.
        **kwargs: as for SFTTrainer.

    Raises:
        ValueError: for a loss that replaces the model's: `loss_type="dft"`, label smoothing, `compute_loss_func`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.loss_type == "dft":
            raise ValueError(
                "loss_type is 'dft', which replaces the model's loss, and with it the router's; it must be 'nll'"
            )
