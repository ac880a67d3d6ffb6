"""The dense checkpoint: a folder or a copy from the hub, its configuration, and its tensors as they are asked for."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from query_experts.common.checkpoints import load_config, reason, require_checkpoint
from query_experts.common.errors import SettingError
from query_experts.convert.configs import check_convertible, untied
from query_experts.convert.weight_map import LAYERS

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what a hub repository may hold besides: the same weights in other forms
NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "onnx/*",
    "original/*",
    "consolidated*",
]


def find_checkpoint(name: str) -> Path:
    """The folder of that name, or the copy of a checkpoint on the hub."""
    require_checkpoint(name, "checkpoint")
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # of the hub's client and of what it calls: of any kind
        raise SettingError(
            f"checkpoint is {name}, which can't be had from the hub ({type(error).__name__}: {reason(error)}); it must "
            "be a folder with config.json and safetensors, or the name of a model on the hub"
        ) from error


def read_config(folder: Path, checkpoint: str) -> PreTrainedConfig:
    """Raises SettingError, naming the checkpoint, for a configuration that can't be read or converted."""
    config = load_config(str(folder), "checkpoint")
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise SettingError(
            f"checkpoint is {checkpoint}, which holds {ADAPTER_CONFIG_NAME}, an adapter that Transformers adds as it "
            "loads the model; it must be merged into the weights first (merge_and_unload of PEFT), or taken away"
        )
    if (named := getattr(config, "transformers_weights", None)) is not None:
        raise SettingError(
            f"checkpoint is {checkpoint}, whose transformers_weights is {named!r}; its weights must be those of "
            f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}"
        )
    try:
        check_convertible(config)
    except SettingError as error:
        raise SettingError(f"checkpoint is {checkpoint}, whose {error}") from error
    return config


class Folder:
    """A dense checkpoint on disk, in one file of safetensors or several; tensors are read when they are asked for."""

    def __init__(self, folder: Path, config: PreTrainedConfig, device: str, stack: ExitStack):
        self.folder, self.config = folder, config
        self.where: dict[str, tuple[Any, str]] = {}  # tensor -> the open file that holds it, and its name there
        files = self._files()
        layers = config.num_hidden_layers
        self.num_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except SafetensorError as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error})") from error
            self.where |= {name: (file, name) for name in file.keys()}  # noqa: SIM118
        for name in self.where:
            number = name.removeprefix(LAYERS).partition(".")[0]
            if name.startswith(LAYERS) and number.isdecimal() and int(number) >= layers:
                raise SettingError(
                    f"checkpoint has a tensor {name}, and its num_hidden_layers is {layers}; both must agree"
                )
        if config.tie_word_embeddings and HEAD in self.where:  # as Transformers loads it
            if EMBEDDINGS not in self.where:
                self.where[EMBEDDINGS] = self.where.pop(HEAD)
            elif torch.equal(self._read(HEAD), self._read(EMBEDDINGS)):
                del self.where[HEAD]
            else:
                self.config = untied(config)

    def _files(self) -> list[Path]:
        """Transformers' choice: one file, and else those that the index lists."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        files = [self.folder / SAFE_WEIGHTS_NAME]
        if not files[0].is_file() and index.exists():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [self.folder / name for name in sorted(set(listed.values()))]
                if any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed.values()):
                    raise ValueError("files outside of the folder")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise SettingError(
                    f"checkpoint is {self.folder}, whose {index.name} is damaged; it must be the index that "
                    "save_pretrained wrote"
                ) from error
        for path in files:
            if not path.is_file():
                raise SettingError(
                    f"checkpoint is {self.folder}, which holds no {path.name}; it must hold weights as safetensors"
                )
        return files

    def outside(self) -> dict[str, Tensor]:
        layers = tuple(f"{LAYERS}{number}." for number in range(self.config.num_hidden_layers))
        return {name: self._read(name) for name in self.where if not name.startswith(layers)}

    def layer(self, number: int) -> dict[str, Tensor]:
        prefix = f"{LAYERS}{number}."
        return {name.removeprefix(prefix): self._read(name) for name in self.where if name.startswith(prefix)}

    def _read(self, name: str) -> Tensor:
        file, there = self.where[name]
        return file.get_tensor(there)
