"""Loading a checkpoint of a folder or of the hub, whole, or refusing it in one sentence that names the setting."""

from __future__ import annotations

import json
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

# what a tokenizer is made of, whatever the case
TOKENIZER = (
    "tokenizer*", "vocab.*", "merges.txt", "bpe.codes", "added_tokens.json", "special_tokens_map.json", "*.model",
    "*.tiktoken", "tekken.json", "tokenization_*.py",
)  # fmt: skip
VALUES_AT_ONCE = 2**24  # that are looked at, so that looking takes little memory

CACHED = ("config.json", "tokenizer_config.json")  # of which a used model has one in the hub's cache


def load_config(checkpoint: str, field: str) -> PreTrainedConfig:
    """Raises SettingError, naming the field, for a checkpoint that isn't there or whose config.json can't be used."""
    require_checkpoint(checkpoint, field)
    local = Path(checkpoint).exists()
    if local:
        check_config_file(Path(checkpoint), field)
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # of Transformers, tokenizers, the hub's HTTP client: of any kind
        what = "whose config.json holds what can't be used" if local else "which can't be had from the hub"
        raise SettingError(f"{field} is {checkpoint}, {what}: {reason(error)}") from error


def check_config_file(folder: Path, field: str) -> None:
    """Raises SettingError for a folder without a config.json of a kind of model that Transformers knows."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise SettingError(f"{field} is {folder}, which is a file; it must be a model's folder")
    if not path.is_file():
        raise SettingError(f"{field} is {folder}, which holds no config.json; it must be a model's folder")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{field} is {folder}, whose config.json is damaged ({error})") from error
    except OSError as error:
        raise SettingError(f"{field} is {folder}, whose config.json can't be read ({error.strerror})") from error
    if not isinstance(held, dict):
        raise SettingError(f"{field} is {folder}, whose config.json holds no JSON object; it must be a model's")
    for name in ("dtype", "torch_dtype"):
        dtype = held.get(name)
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
        if not known and dtype is not None and not isinstance(dtype, dict):  # one for each part of a model
            raise SettingError(
                f"{field} is {folder}, whose config.json holds {name} {dtype!r}; it must be a dtype of torch"
            )
    model_type = held.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise SettingError(
            f"{field} is {folder}, whose config.json holds model_type {model_type!r}; it must be one that Transformers "
            f"{transformers.__version__} knows"
        )


def load_gqe(folder: Path, field: str = "checkpoint") -> tuple[PreTrainedModel, Any]:
    """A `GQEForCausalLM` in float32 and its tokenizer. Raises SettingError, naming the field, if there is none."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not folder.exists():
        raise SettingError(f"{field} is {folder}, which doesn't exist; it must be a GQE checkpoint's folder")
    model_type = load_config(str(folder), field).model_type
    if model_type != "gqe":
        raise SettingError(f"{field} is {folder}, whose model_type is {model_type!r}; it must be 'gqe'")
    model = load_whole(AutoModelForCausalLM, str(folder), torch.float32, field)
    return model, load_tokenizer(str(folder), model, field)


def has_tokenizer(checkpoint: str) -> bool:
    """Whether a folder holds anything of one; of the hub it is taken for granted."""
    folder = Path(checkpoint)
    return not folder.exists() or any(is_named(path, TOKENIZER) for path in folder.iterdir())


def is_named(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns)


def load_tokenizer(checkpoint: str, model: PreTrainedModel, field: str) -> Any:
    """The tokenizer of a model. Raises SettingError, naming the field, for none, and for one that isn't the model's."""
    if not has_tokenizer(checkpoint):
        raise SettingError(f"{field} is {checkpoint}, which holds no tokenizer; it must have its own beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # of Transformers, tokenizers, the hub's HTTP client: of any kind
        raise SettingError(
            f"{field} is {checkpoint}, whose tokenizer can't be loaded ({reason(error)}); it must have one beside it, "
            "as save_pretrained writes it"
        ) from error
    size, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if not tokenizer.vocab_size or size > rows:
        raise SettingError(
            f"{field} is {checkpoint}, whose tokenizer has {size} tokens and whose model {rows}; it must have its own "
            "tokenizer beside it"
        )
    return tokenizer


def load_whole(kind: Any, checkpoint: str, dtype: Any, field: str) -> Any:
    """A model of a folder or the hub, by its class or Auto class.

    Raises SettingError, naming the field, for a checkpoint that can't be loaded, that lacks weights or holds them in
    another shape, in whose place Transformers would draw new ones, that holds layers which config.json doesn't, or
    whose numbers aren't finite.
    """
    config = load_config(checkpoint, field)
    try:
        model, loading = kind.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # of Transformers, tokenizers, the hub's HTTP client: of any kind
        raise SettingError(f"{field} is {checkpoint}, which can't be loaded: {reason(error)}") from error
    if loading["mismatched_keys"]:
        name, held, wanted = min(loading["mismatched_keys"])
        raise SettingError(
            f"{field} is {checkpoint}, whose {name} has shape {list(held)}; by config.json it must have {list(wanted)}"
        )
    if missing := sorted(loading["missing_keys"]):
        raise SettingError(
            f"{field} is {checkpoint}, which lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]}; it must hold them all"
        )
    held = model.state_dict()
    if beyond := sorted(filter(partial(is_unexpected_layer, model, held), loading["unexpected_keys"])):
        raise SettingError(f"{field} is {checkpoint}, which holds {beyond[0]}; by config.json it must not be there")
    for name, tensor in held.items():  # a frozen router is no parameter
        if not is_finite(tensor):
            raise SettingError(f"{field} is {checkpoint}, whose {name} holds numbers that aren't finite; all must be")
    return model


def is_unexpected_layer(model: PreTrainedModel, held: dict[str, Tensor], name: str) -> bool:
    """Whether a tensor that the model, which has those held, has no place for tells of another config.json.

    Other models' checkpoints may hold more than Transformers uses, but not what a layer of the model has by a number
    that it hasn't.
    """
    if model.config.model_type == "gqe":
        return True
    first = re.sub(r"(^|\.)\d+\.", r"\g<1>0.", name, count=1)
    return first != name and (first in held or f"{model.base_model_prefix}.{first}" in held)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, from which scores and losses would be nonsense."""
    return all(bool(part.isfinite().all()) for part in tensor.detach().reshape(-1).split(VALUES_AT_ONCE))


def reason(error: BaseException) -> str:
    """What an error says, in one line; with its kind where it only names what it didn't find."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # a wrapper
        error = error.__cause__
    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else f"{said[:300]} ..."
    return (
        said
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        else f"{type(error).__name__}: {said}"
    )


def require_checkpoint(name: str, field: str) -> None:
    """Raises SettingError for a name that is neither a folder's nor, as far as the hub tells, a model's there."""
    if not name:
        raise SettingError(f"{field} is empty; it must be a folder, or a model on the hub")
    path = Path(name)
    if os.path.exists(path):  # unlike Path's own, it takes any name
        return
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        why: str | None = "doesn't exist"
    elif os.path.islink(path):
        why = "is a link to nothing"
    else:
        why = missing_on_hub(name)
        why = f"is no folder here, and {why}" if why is not None else None
    if why is not None:
        raise SettingError(f"{field} is {name}, which {why}; it must be a folder, or a model on the hub")


def missing_on_hub(name: str, repo_type: str = "model") -> str | None:
    """Why the hub can't have what is asked for, by one question; None if it can, or the cache has it.

    The libraries that read from it would ask again and again, for half a minute.
    """
    try:
        if any(isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str) for file in CACHED):
            return None
        if HfApi().repo_exists(name, repo_type=repo_type):
            return None
        return f"the hub has no {repo_type} of that name, or none without logging in (hf auth login)"
    except HFValidationError:
        return "the hub has no such names"
    except OfflineModeIsEnabled:  # they look in their caches then, and don't wait
        return None
    except Exception as error:  # the HTTP client's, which is another package from one version of the hub's to the next
        return f"the hub can't be asked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
