"""Copies the files next to a checkpoint's weights: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from query_experts.common.checkpoints import TOKENIZER_FILES, has_tokenizer, matches_any, reason
from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json, write_json

# patterns of the copied files, in lower case
COPIED_FILES = (
    *TOKENIZER_FILES, "chat_template*", "generation_config.json", "*license*", "*licence*", "copying*", "notice*",
    "use_policy*",
)  # fmt: skip


def sidecar_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if matches_any(path, COPIED_FILES))


def check_sidecar_files(folder: Path) -> None:
    """Raises SettingError for a .json file among them that holds no JSON object."""
    for path in sidecar_files(folder):
        if path.suffix == ".json":
            try:
                value = parse_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error}); it must be JSON") from error
            if not isinstance(value, dict):
                raise SettingError(f"checkpoint holds {path}, which is damaged; it must be a JSON object")


def tokenizer_note(folder: Path) -> str | None:
    """Why a converted checkpoint's tokenizer can't be used here, without a full stop; None if it can."""
    if not has_tokenizer(str(folder)):
        return "the checkpoint has no tokenizer, and so the GQE checkpoint has none"
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers and tokenizers raise errors of any kind
        return f"the tokenizer was copied as it is, and can't be loaded here ({reason(error)})"
    return None


def sidecar_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in sidecar_files(folder))


def copy_sidecar_files(folder: Path, target: Path) -> None:
    """Copy the sidecar files, and the folder of additional chat templates, from one checkpoint's folder to another."""
    for path in sidecar_files(folder):
        shutil.copyfile(path, target / path.name)
    templates = "additional_chat_templates"
    if (folder / templates).is_dir():
        shutil.copytree(folder / templates, target / templates)
    keep_tokenizer_class(folder, target)


def keep_tokenizer_class(folder: Path, target: Path) -> None:
    """Name the tokenizer's class in the copy, where Transformers would load another one than for the dense model.

    For some model types (Mistral, Phi-3, Qwen2) Transformers doesn't load the class that tokenizer_config.json names.
    """
    wanted = tokenizer_class(folder)
    if wanted in (None, tokenizer_class(target)):
        return
    path = target / "tokenizer_config.json"
    config = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, config | {"tokenizer_class": wanted})


def tokenizer_class(folder: Path) -> str | None:
    """The name of the class of a checkpoint's tokenizer; None if it has none, or it can't be loaded."""
    if not has_tokenizer(str(folder)):
        return None
    try:
        return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
    except Exception:  # Transformers and tokenizers raise errors of any kind; `tokenizer_note` tells them
        return None
