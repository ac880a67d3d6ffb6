"""Loading a checkpoint of a folder or of the hub, whole, or refusing it in one sentence that names the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from query_experts.errors import SettingError

# what loading a checkpoint raises: damaged weights, weights of another shape, a setting that can't be, in
# Transformers' own code; weights that need a package which isn't there
UNLOADABLE = (OSError, ValueError, SafetensorError, RuntimeError, StrictDataclassError, LookupError, TypeError,
              AttributeError, ArithmeticError, ImportError)  # fmt: skip

CACHED = ("config.json", "tokenizer_config.json")  # of which a used model has one in the hub's cache


def load_config(checkpoint: str, field: str) -> PreTrainedConfig:
    """Raises SettingError, naming the field, for a checkpoint that isn't there or whose config.json can't be used."""
    require_checkpoint(checkpoint, field)
    if Path(checkpoint).exists():
        check_config_file(Path(checkpoint), field)
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except UNLOADABLE as error:
        raise SettingError(
            f"{field} is {checkpoint}, whose config.json holds what can't be used: {reason(error)}"
        ) from error


def check_config_file(folder: Path, field: str) -> None:
    """Raises SettingError for a folder without a config.json of a kind of model that Transformers knows."""
    path = folder / "config.json"
    if not path.is_file():
        raise SettingError(f"{field} is {folder}, which holds no config.json; it must be a model's folder")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{field} is {folder}, whose config.json is damaged ({error})") from error
    model_type = held.get("model_type") if isinstance(held, dict) else None
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UNLOADABLE as error:
        raise SettingError(f"{field} is {folder}, whose tokenizer can't be loaded: {reason(error)}") from error
    return load_whole(AutoModelForCausalLM, str(folder), torch.float32, field), tokenizer


def load_whole(kind: Any, checkpoint: str, dtype: Any, field: str) -> Any:
    """A model of a folder or the hub, by its class or Auto class.

    Raises SettingError, naming the field, for a checkpoint that can't be loaded, that lacks weights or holds them in
    another shape, in whose place Transformers would draw new ones, or whose numbers aren't finite.
    """
    config = load_config(checkpoint, field)
    try:
        model, loading = kind.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )  # fmt: skip
    except UNLOADABLE as error:
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
    require_finite(model, f"{field} is {checkpoint}")
    return model


def reason(error: BaseException) -> str:
    """What an error says, in one line; with its kind where it only names what it didn't find."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # a wrapper
        error = error.__cause__
    said = " ".join(str(error).split())[:300]
    return (
        said
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        else f"{type(error).__name__}: {said}"
    )


def require_checkpoint(name: str, field: str) -> None:
    """Raises SettingError for a name that is neither a folder's nor, as far as the hub tells, a model's there."""
    path = Path(name)
    if path.exists():
        return
    local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    local = local or (len(path.parts) == 2 and path.parent.is_dir())
    why = missing_on_hub(name) if not local else None
    if local or why is not None:
        where = "doesn't exist" if local else f"is no folder here, and {why}"
        raise SettingError(f"{field} is {name}, which {where}; it must be a folder, or a model on the hub")


def missing_on_hub(name: str, repo_type: str = "model") -> str | None:
    """Why the hub, or its cache, can't have what is asked for; None if it can. The hub is asked once.

    The libraries that read from it would try again for half a minute.
    """
    try:
        if any(isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str) for file in CACHED):
            return None
        return None if HfApi().repo_exists(name, repo_type=repo_type) else f"the hub has no {repo_type} of that name"
    except HFValidationError:
        return "the hub has no such names"
    except OfflineModeIsEnabled:  # they look in their caches then, and don't wait
        return None
    except Exception as error:  # the HTTP client's, which is another package from one version of the hub's to the next
        return f"the hub can't be asked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def require_finite(model: PreTrainedModel, which: str) -> None:
    """Raises SettingError for weights that hold NaN or infinity, from which scores and losses would be nonsense."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SettingError(f"{which}, whose {name} holds numbers that aren't finite; all must be")
