"""The settings of `query-experts evaluate` and `query-experts generate`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Annotated, Literal

from query_experts.common.device import Device, check_device, resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.fields import Bounds, Count, NotEmpty, Seed, Settings, argument, option, required_option
from query_experts.common.settings import validate
from query_experts.model.kernel_choice import Kernels, check_kernels_setting, kernels_option

LOWEST_TEMPERATURE = 1e-3  # far below it, logits overflow


Checkpoint = Annotated[str, NotEmpty("be a checkpoint's folder")]


@dataclass
class EvaluateSettings(Settings):
    """One evaluation of a checkpoint.

    Attributes:
        torch_device: The device that `device` means on this machine.
    """

    checkpoint: Checkpoint = argument(
        "folder of a causal model as Transformers saves it, with its tokenizer; or a hub name"
    )
    tasks: list[str] = required_option(
        "tasks, groups or tags of lm-eval, such as hellaswag,arc_easy,piqa", "tasks", metavar="TASK"
    )
    data_dir: str | None = option(
        None, "folder of benchmark files in their original format, in place of the hub", "tasks", metavar="FOLDER"
    )
    batch_size: Count = option(8, "requests in a batch", "machine")
    limit: Count | None = option(None, "score only N questions of each task, to try things", "tasks")
    num_fewshot: Annotated[int, Bounds(least=0)] | None = option(
        None, "examples before a question; default: the task's own number", "tasks"
    )
    max_length: Count | None = option(
        None, "tokens that the model gets at once; default: max_position_embeddings", "tasks"
    )
    device: Device = option("auto", "device to score on; auto: cuda where there is one, else cpu", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the weights; auto: that of the checkpoint", "machine"
    )
    out: Annotated[str, NotEmpty("be a new file")] | None = option(
        None, "new file for the results, JSON", "output", metavar="FILE"
    )

    def __post_init__(self) -> None:
        self.torch_device = resolve_device(self.device)

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        check_device(self.device)


@dataclass
class GenerateSettings(Settings):
    """One text to generate.

    Attributes:
        torch_device: The device that `device` means on this machine.
        prompt_text: The prompt as text, also where the locale's encoding is ASCII. Raises UnicodeError if it isn't
            UTF-8.
    """

    checkpoint: Checkpoint = argument("folder of a GQE checkpoint, with its tokenizer")
    prompt: str = option("def ", "beginning of the text, which no chat template changes", "text")
    max_new_tokens: Count = option(100, "tokens to generate", "text")
    temperature: float = option(0.8, "temperature of the sampling; 0: always the most probable token", "text")
    seed: Seed = option(0, "seed of the sampling", "text")
    device: Device = option("auto", "device to generate on; auto: cuda where there is one, else cpu", "machine")
    kernels: Kernels = kernels_option("machine")

    def __post_init__(self) -> None:
        self.torch_device = resolve_device(self.device)

    @property
    def prompt_text(self) -> str:
        undecoded = any("\udc80" <= letter <= "\udcff" for letter in self.prompt)  # bytes that Python couldn't decode
        return os.fsencode(self.prompt).decode() if undecoded else self.prompt

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        try:
            self.prompt_text.encode()
        except UnicodeError as error:
            raise SettingError(f"prompt is {self.prompt!r}, which isn't UTF-8; it must be text") from error
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise SettingError(
                f"temperature is {self.temperature}; it must be 0, or a number from {LOWEST_TEMPERATURE} on"
            )
        check_device(self.device)
        check_kernels_setting(self.kernels, self.torch_device)
