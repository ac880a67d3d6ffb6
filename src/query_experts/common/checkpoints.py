"""Loads checkpoints from a folder or the hub; refuses an unusable one in a sentence that names the setting."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json

# patterns of a tokenizer's files, in lower case
TOKENIZER_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "bpe.codes", "added_tokens.json", "special_tokens_map.json", "*.model",
    "*.tiktoken", "tekken.json", "tokenization_*.py",
)  # fmt: skip
VALUES_AT_ONCE = 2**24  # values that is_finite reads at a time, to save memory

CACHED_FILES = ("config.json", "tokenizer_config.json")  # the hub's cache has one of them for each model in use


def load_config(checkpoint: str, field: str) -> PreTrainedConfig:
    """Load the configuration of a checkpoint, without running code of the checkpoint.

    Args:
        checkpoint: a folder, or the name of a model on the hub.
        field: the setting that names the checkpoint, for error sentences.

    Raises:
        SettingError: if the checkpoint doesn't exist or its config.json can't be used.
    """
    require_checkpoint(checkpoint, field)
    local = Path(checkpoint).exists()
    if local:
        check_config_file(Path(checkpoint), field)
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # Transformers, tokenizers and the hub's HTTP client raise errors of any kind
        problem = "whose config.json holds what can't be used" if local else "which can't be loaded from the hub"
        raise SettingError(f"{field} is {checkpoint}, {problem}: {reason(error)}") from error


def check_config_file(folder: Path, field: str) -> None:
    """Raises SettingError unless the folder has a config.json with a model type that Transformers knows."""
    config = read_config_file(folder, field)
    for name in ("dtype", "torch_dtype"):
        dtype = config.get(name)
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
        if not known and dtype is not None and not isinstance(dtype, dict):  # a dictionary holds one for each submodel
            raise SettingError(
                f"{field} is {folder}, whose config.json holds {name} {dtype!r}; it must be a dtype of torch"
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise SettingError(
            f"{field} is {folder}, whose config.json holds model_type {model_type!r}; it must be one that Transformers "
            f"{transformers.__version__} knows"
        )


def read_config_file(folder: Path, field: str) -> dict[str, Any]:
    """The fields of a folder's config.json. Raises SettingError if there is none, or it is no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise SettingError(f"{field} is {folder}, which is a file; it must be a model's folder")
    if not path.is_file():
        raise SettingError(f"{field} is {folder}, which holds no config.json; it must be a model's folder")
    return _read_object(path, field)


def _read_object(path: Path, field: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises SettingError if it is none."""
    whose = f"{field} is {path.parent}, whose {path.name}"
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{whose} is damaged ({error})") from error
    except OSError as error:
        raise SettingError(f"{whose} can't be read ({error.strerror})") from error
    if not isinstance(value, dict):
        raise SettingError(f"{whose} holds no JSON object; it must be a model's")
    return value


def load_gqe_config(folder: Path, field: str) -> PreTrainedConfig:
    """The configuration of a GQE checkpoint. Raises SettingError for any other folder."""
    if not folder.exists():
        raise SettingError(f"{field} is {folder}, which doesn't exist; it must be a GQE checkpoint's folder")
    config = load_config(str(folder), field)
    if config.model_type != "gqe":
        raise SettingError(f"{field} is {folder}, whose model_type is {config.model_type!r}; it must be 'gqe'")
    return config


def load_gqe(folder: Path, field: str = "checkpoint", **more: Any) -> tuple[PreTrainedModel, Any]:
    """Load a GQE checkpoint and its tokenizer.

    Args:
        folder: the checkpoint's folder.
        field: the setting that names the folder, for error sentences.
        **more: as for `load_whole`.

    Returns:
        A `GQEForCausalLM` in float32, on the CPU unless `more` says otherwise, and the tokenizer.

    Raises:
        SettingError: if the folder holds no GQE checkpoint, or one that `load_whole` or `load_tokenizer` refuses.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    load_gqe_config(folder, field)
    model = load_whole(AutoModelForCausalLM, str(folder), torch.float32, field, **more)
    return model, load_tokenizer(str(folder), model, field)


def has_tokenizer(checkpoint: str) -> bool:
    """Whether a folder holds a tokenizer's files; always true for a checkpoint on the hub."""
    folder = Path(checkpoint)
    return not folder.exists() or any(matches_any(path, TOKENIZER_FILES) for path in folder.iterdir())


def matches_any(path: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a path is a file whose name, in lower case, matches one of the patterns."""
    return path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns)


def load_tokenizer(checkpoint: str, model: PreTrainedModel, field: str) -> Any:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: a folder, or the name of a model on the hub.
        model: the checkpoint's model, whose embedding must have a row for each token.
        field: the setting that names the checkpoint, for error sentences.

    Raises:
        SettingError: if there is no tokenizer, if it can't be loaded, or if it is another model's.
    """
    if not has_tokenizer(checkpoint):
        raise SettingError(f"{field} is {checkpoint}, which holds no tokenizer; it must hold its own next to the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # Transformers, tokenizers and the hub's HTTP client raise errors of any kind
        raise SettingError(
            f"{field} is {checkpoint}, whose tokenizer can't be loaded ({reason(error)}); it must hold one as "
            "save_pretrained writes it"
        ) from error
    size, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if not tokenizer.vocab_size or size > rows:
        raise SettingError(
            f"{field} is {checkpoint}, whose tokenizer has {size} tokens and whose model {rows}; it must hold the "
            "model's own tokenizer"
        )
    return tokenizer


def tokens_after_text(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts after every text by itself, such as that of an eos token."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    added = 0
    while added < len(encoded.input_ids) and encoded.special_tokens_mask[-1 - added]:
        added += 1
    return encoded.input_ids[len(encoded.input_ids) - added :]


def load_whole(kind: Any, checkpoint: str, dtype: Any, field: str, **more: Any) -> Any:
    """Load a model and refuse a checkpoint that isn't complete.

    Transformers itself would draw missing weights, or weights of another shape, at random.

    Args:
        kind: the model's class, or an Auto class.
        checkpoint: a folder, or the name of a model on the hub.
        dtype: of the weights; a torch.dtype or its name, or "auto" for the checkpoint's own.
        field: the setting that names the checkpoint, for error sentences.
        **more: for `from_pretrained`; one that is None is left out.

    Raises:
        SettingError: if the checkpoint can't be loaded, has a damaged generation_config.json, lacks weights, has
            weights of another shape, has layers that config.json doesn't have, or has weights that aren't finite.
    """
    config = load_config(checkpoint, field)
    if (generation := Path(checkpoint) / "generation_config.json").is_file():
        _read_object(generation, field)  # Transformers passes over one that is damaged
    try:
        model, loading = kind.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False, **{name: value for name, value in more.items() if value is not None},
        )  # fmt: skip
    except Exception as error:  # Transformers, tokenizers and the hub's HTTP client raise errors of any kind
        raise SettingError(f"{field} is {checkpoint}, which can't be loaded: {reason(error)}") from error
    if loading["mismatched_keys"]:
        name, shape, expected = min(loading["mismatched_keys"])
        raise SettingError(
            f"{field} is {checkpoint}, whose {name} has shape {list(shape)}; by config.json it must have "
            f"{list(expected)}"
        )
    if missing := sorted(loading["missing_keys"]):
        raise SettingError(
            f"{field} is {checkpoint}, which lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]}; it must hold them all"
        )
    tensors = model.state_dict()  # also has what is no parameter, such as a frozen router
    if unexpected := sorted(filter(partial(is_unexpected_layer, model, tensors), loading["unexpected_keys"])):
        raise SettingError(f"{field} is {checkpoint}, which holds {unexpected[0]}; by config.json it must not be there")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise SettingError(f"{field} is {checkpoint}, whose {name} holds numbers that aren't finite; all must be")
    return model


def is_unexpected_layer(model: PreTrainedModel, tensors: dict[str, Tensor], name: str) -> bool:
    """Whether a tensor of the checkpoint that the model has no place for shows that config.json is another model's.

    In a GQE checkpoint every such tensor does. Other checkpoints may hold tensors that Transformers doesn't use, but no
    tensor of a layer whose number the model doesn't have. tensors: those that the model has, by name.
    """
    if model.config.model_type == "gqe":
        return True
    in_layer_0 = re.sub(r"(^|\.)\d+\.", r"\g<1>0.", name, count=1)
    return in_layer_0 != name and (in_layer_0 in tensors or f"{model.base_model_prefix}.{in_layer_0}" in tensors)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    tensor = getattr(tensor, "to_local", lambda: tensor)().detach()  # of a rank's shard, its own part
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(VALUES_AT_ONCE))


def reason(error: BaseException) -> str:
    """The text of an error in one line, cut to 300 characters; with its type unless the text explains itself."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # a wrapper of the real error
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return (
        text
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        else f"{type(error).__name__}: {text}"
    )


def require_checkpoint(name: str, field: str) -> None:
    """Raises SettingError unless the name is that of a folder, or of a model on the hub, as far as the hub answers."""
    if not name:
        raise SettingError(f"{field} is empty; it must be a folder, or a model on the hub")
    path = Path(name)
    if os.path.exists(path):  # Path.exists raises for some names
        return
    problem: str | None
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        problem = "doesn't exist"
    elif os.path.islink(path):
        problem = "is a link to nothing"
    else:
        problem = missing_on_hub(name)
        problem = f"is no folder here, and {problem}" if problem is not None else None
    if problem is not None:
        raise SettingError(f"{field} is {name}, which {problem}; it must be a folder, or a model on the hub")


def missing_on_hub(name: str, repo_type: str = "model") -> str | None:
    """Why the hub can't provide a repository, as a clause of a sentence; None if it can, or the cache has it.

    It asks the hub once. The libraries that load from the hub would retry for half a minute.
    """
    try:
        if any(isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str) for file in CACHED_FILES):
            return None
        if HfApi().repo_exists(name, repo_type=repo_type):
            return None
        return f"the hub has no {repo_type} of that name, or none without logging in (hf auth login)"
    except HFValidationError:
        return "the hub has no such names"
    except OfflineModeIsEnabled:  # the libraries then read only their caches, without a delay
        return None
    except Exception as error:  # the HTTP client's; which client it is depends on the hub package's version
        return f"the hub can't be asked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
