"""What lies beside a checkpoint's weights and comes along: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from query_experts.common.checkpoints import TOKENIZER, has_tokenizer, is_named, reason
from query_experts.common.errors import SettingError

# what comes along, whatever the case of its name
COPIED = (
    *TOKENIZER, "chat_template*", "generation_config.json", "*license*", "*licence*", "copying*", "notice*",
    "use_policy*",
)  # fmt: skip


def copied(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_named(path, COPIED))


def check_sidecar_files(folder: Path) -> None:
    """Raises SettingError for a file that would come along and holds no JSON object, though its name says so."""
    for path in copied(folder):
        if path.suffix == ".json":
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error}); it must be JSON") from error
            if not isinstance(held, dict):
                raise SettingError(f"checkpoint holds {path}, which is damaged; it must be a JSON object")


def tokenizer_note(folder: Path) -> str | None:
    """What is to be said of a converted checkpoint's tokenizer, if it can't be used here."""
    if not has_tokenizer(str(folder)):
        return "the checkpoint has no tokenizer, and so the GQE checkpoint has none"
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of Transformers and tokenizers, which raise Exception itself
        return f"the tokenizer was copied as it is, and can't be loaded here ({reason(error)})"
    return None


def copied_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in copied(folder))


def copy_sidecar_files(folder: Path, building: Path) -> None:
    """Tokenizer, chat templates, generation settings and licence."""
    for path in copied(folder):
        shutil.copyfile(path, building / path.name)
    templates = "additional_chat_templates"
    if (folder / templates).is_dir():
        shutil.copytree(folder / templates, building / templates)
