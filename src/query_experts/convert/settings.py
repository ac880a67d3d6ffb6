"""The settings of `query-experts convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from query_experts.common.device import Device, check_device, resolve_device
from query_experts.common.fields import Seed, Settings, argument, option
from query_experts.common.settings import validate
from query_experts.convert.layers import ROUTERS


@dataclass
class ConvertSettings(Settings):
    """One conversion of a checkpoint.

    Attributes:
        torch_device: The device that `device` means on this machine.
    """

    checkpoint: str = argument("folder of a dense checkpoint, or its name on the hub")
    out: str = argument("new or empty folder for the GQE checkpoint")
    top_k: int | None = option(
        None, "active experts per group, 1 to all of them; default: all, which is the dense model", "conversion"
    )
    output_projection: Literal["expert", "slot"] = option(
        "expert", "expert: equal to the dense model while all experts are active; slot: the paper's", "conversion"
    )
    router: str | None = option(
        None, "initial router; none: the control without a router; default: calibrated with --calibrate, else random",
        "conversion", metavar=f"{{{','.join(ROUTERS)}}}", none_is_a_word=True,
    )  # fmt: skip
    calibrate: list[str] = option(
        [], "text files or folders, or a hub dataset, on which the dense model's heads are observed and the "
            "difference between the models is measured", "text", metavar="PATH",
    )  # fmt: skip
    calibration_tokens: int | None = option(None, "tokens to read, five sequences or more; default: 16384", "text")
    calibration_length: int | None = option(
        None, "tokens in a sequence, 2 or more; default: 512, or max_position_embeddings where that is less", "text"
    )
    text_field: str | None = option(
        None, "field of a jsonl line or parquet column that holds the text; default: text", "text"
    )
    seed: Seed = option(0, "seed of random initial values", "conversion")
    device: Device = option("auto", "device to convert on; auto: cuda where there is one, else cpu", "machine")

    def __post_init__(self) -> None:
        self.torch_device = resolve_device(self.device)

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        check_device(self.device)
