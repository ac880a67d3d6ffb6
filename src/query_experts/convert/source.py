"""Reads a dense checkpoint: finds its folder or downloads it, loads its configuration, and reads tensors on demand."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from query_experts.common.checkpoints import load_config, read_config_file, reason, require_checkpoint
from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json
from query_experts.convert.configs import check_convertible, with_untied_embeddings
from query_experts.convert.weight_map import LAYER_PREFIX
from query_experts.model.rotary import check_rope_values

EMBEDDINGS, OUTPUT_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
# the same weights in other forms, which a hub repository may also hold
NOT_DOWNLOADED = [
    "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "original/*", "consolidated*",
]  # fmt: skip


def find_checkpoint(name: str) -> Path:
    """The folder of that name, or a downloaded copy of the checkpoint on the hub. Raises SettingError for neither."""
    require_checkpoint(name, "checkpoint")
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, ignore_patterns=NOT_DOWNLOADED))
    except Exception as error:  # the hub's client and its HTTP client raise errors of any kind
        raise SettingError(
            f"checkpoint is {name}, which can't be loaded from the hub ({type(error).__name__}: {reason(error)}); it "
            "must be a folder with config.json and safetensors, or the name of a model on the hub"
        ) from error


def load_dense_config(folder: Path, checkpoint: str) -> PreTrainedConfig:
    """The configuration of a dense checkpoint.

    checkpoint: its name, for error sentences. Raises SettingError if it can't be loaded, if the model can't be
    converted, or if Transformers would take weights from elsewhere.
    """
    check_rope_in_file(folder, checkpoint)
    config = load_config(str(folder), "checkpoint")
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise SettingError(
            f"checkpoint is {checkpoint}, which holds {ADAPTER_CONFIG_NAME}, an adapter that Transformers adds when it "
            "loads the model; it must be merged into the weights first (merge_and_unload of PEFT), or removed"
        )
    if (weights := getattr(config, "transformers_weights", None)) is not None:
        raise SettingError(
            f"checkpoint is {checkpoint}, whose transformers_weights is {weights!r}; its weights must be those of "
            f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}"
        )
    try:
        check_convertible(config)
    except SettingError as error:
        raise SettingError(f"checkpoint is {checkpoint}, whose {error}") from error
    return config


def check_rope_in_file(folder: Path, checkpoint: str) -> None:
    """Raises SettingError for rotary parameters in config.json over which Transformers stumbles when it loads them."""
    fields = read_config_file(folder, "checkpoint")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    try:
        check_rope_values(rope)
    except ValueError as error:
        raise SettingError(f"checkpoint is {checkpoint}, whose {error}") from error


class CheckpointFolder:
    """A dense checkpoint on disk, in one safetensors file or several; reads tensors when they are asked for.

    stack: keeps the files open. Raises SettingError for missing or damaged files, and for layers that the
    configuration doesn't have.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig, device: str, stack: ExitStack):
        self.folder, self.config = folder, config
        self.places: dict[str, tuple[Any, str]] = {}  # tensor -> the open file that holds it, and its name there
        files = self._files()
        self.num_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except SafetensorError as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error})") from error
            self.places |= {name: (file, name) for name in file.keys()}  # noqa: SIM118
        self._check_layers()
        if config.tie_word_embeddings and OUTPUT_EMBEDDING in self.places:  # as Transformers loads it
            if EMBEDDINGS not in self.places:
                self.places[EMBEDDINGS] = self.places.pop(OUTPUT_EMBEDDING)
            elif torch.equal(self._read(OUTPUT_EMBEDDING), self._read(EMBEDDINGS)):
                del self.places[OUTPUT_EMBEDDING]
            else:
                self.config = with_untied_embeddings(config)

    def _files(self) -> list[Path]:
        """The files that Transformers would load: the single one, or else those in the index."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        files = [self.folder / SAFE_WEIGHTS_NAME]
        if not files[0].is_file() and index.exists():
            try:
                names = parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()
                files = [self.folder / name for name in sorted(set(names))]
                if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
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

    def _check_layers(self) -> None:
        layers = self.config.num_hidden_layers
        for name in self.places:
            number = name.removeprefix(LAYER_PREFIX).partition(".")[0]
            if name.startswith(LAYER_PREFIX) and number.isdecimal() and int(number) >= layers:
                raise SettingError(
                    f"checkpoint has a tensor {name}, and its num_hidden_layers is {layers}; both must agree"
                )

    def outside(self) -> dict[str, Tensor]:
        layers = tuple(f"{LAYER_PREFIX}{number}." for number in range(self.config.num_hidden_layers))
        return {name: self._read(name) for name in self.places if not name.startswith(layers)}

    def layer(self, number: int) -> dict[str, Tensor]:
        prefix = f"{LAYER_PREFIX}{number}."
        return {name.removeprefix(prefix): self._read(name) for name in self.places if name.startswith(prefix)}

    def _read(self, name: str) -> Tensor:
        file, name_in_file = self.places[name]
        return file.get_tensor(name_in_file)
