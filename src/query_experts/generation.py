"""`query-experts generate`: text from a GQE checkpoint, printed as it comes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TextStreamer, set_seed
from transformers.utils import logging

from query_experts.errors import SettingError
from query_experts.modeling_gqe import GQEForCausalLM
from query_experts.study.settings import check_seeds, resolve_device

LOWEST_TEMPERATURE = 1e-3  # far below it, logits overflow
# what loading a checkpoint raises: damaged weights, weights of another shape, a setting that can't be, in
# Transformers' own code; weights that need a package which isn't there
UNLOADABLE = (OSError, ValueError, SafetensorError, RuntimeError, StrictDataclassError, LookupError, TypeError,
              AttributeError, ArithmeticError, ImportError)  # fmt: skip


def generate(
    checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str = "auto"
) -> None:
    """Print the prompt and its continuation. Raises SettingError, e.g. for a checkpoint that isn't GQE."""
    if not prompt:
        raise SettingError("prompt is empty; it must hold text")
    if max_new_tokens < 1:
        raise SettingError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise SettingError(f"temperature is {temperature}; it must be 0, or a number from {LOWEST_TEMPERATURE} on")
    check_seeds("seed", [seed])
    device = resolve_device(device)
    model, tokenizer = load_checkpoint(checkpoint)
    set_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    model.to(device).eval().generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


def load_checkpoint(folder: Path, field: str = "checkpoint") -> tuple[GQEForCausalLM, AutoTokenizer]:
    """Model and tokenizer of a folder. Raises SettingError, naming the field, if it is no usable GQE checkpoint."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not (folder / "config.json").is_file():
        raise SettingError(f"{field} is {folder}, which holds no config.json; it must be a GQE checkpoint's folder")
    try:
        model_type = AutoConfig.from_pretrained(folder).model_type
        if model_type != "gqe":
            raise SettingError(f"{field} is {folder}, whose model_type is {model_type!r}; it must be 'gqe'")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except SettingError:
        raise
    except UNLOADABLE as error:
        raise SettingError(f"{field} is {folder}, which can't be loaded: {reason(error)}") from error
    return load_whole(GQEForCausalLM, str(folder), torch.float32, field), tokenizer


def load_whole(kind: Any, checkpoint: str, dtype: Any, field: str) -> Any:
    """A model of a folder or the hub, by its class or Auto class.

    Raises SettingError, naming the field, for a checkpoint that can't be loaded, that lacks weights or holds them in
    another shape, in whose place Transformers would draw new ones, or whose numbers aren't finite.
    """
    require_folder(checkpoint, field)
    try:
        model, loading = kind.from_pretrained(
            checkpoint, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except UNLOADABLE as error:
        where = "" if Path(checkpoint).exists() else " (no folder here has this name)"
        raise SettingError(f"{field} is {checkpoint}, which can't be loaded{where}: {reason(error)}") from error
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
    said = " ".join(str(error).split())[:300]
    return (
        said
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        else f"{type(error).__name__}: {said}"
    )


def require_folder(name: str, field: str) -> None:
    """Raises SettingError for what can only be a folder's name, and not a model's on the hub, if there is none."""
    path = Path(name)
    local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    local = local or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not path.exists():
        raise SettingError(f"{field} is {name}, which doesn't exist; it must be a folder, or a model on the hub")


def require_finite(model: PreTrainedModel, which: str) -> None:
    """Raises SettingError for weights that hold NaN or infinity, from which scores and losses would be nonsense."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SettingError(f"{which}, whose {name} holds numbers that aren't finite; all must be")
