"""Copies the files next to a checkpoint's weights: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from query_experts.common.checkpoints import TOKENIZER_FILES, has_tokenizer, matches_any, reason
from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json

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
