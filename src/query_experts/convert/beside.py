"""What lies beside a checkpoint's weights and comes along: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from transformers import AutoTokenizer

from query_experts.checkpoints import UNLOADABLE, reason
from query_experts.errors import SettingError

# what comes along, whatever the case of its name
TOKENIZER = (
    "tokenizer*", "vocab.*", "merges.txt", "bpe.codes", "added_tokens.json", "special_tokens_map.json", "*.model",
    "*.tiktoken", "tekken.json",
)  # fmt: skip
COPIED = (
    *TOKENIZER, "chat_template*", "generation_config.json", "*license*", "*licence*", "copying*", "notice*",
    "use_policy*",
)  # fmt: skip


def is_copied(path: Path, patterns: tuple[str, ...] = COPIED) -> bool:
    return path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns)


def check_beside(folder: Path) -> None:
    """Raises SettingError for a file that would come along and is no JSON, though its name says so."""
    for path in sorted(filter(is_copied, folder.iterdir())):
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SettingError(f"checkpoint holds {path}, which is damaged ({error}); it must be JSON") from error


def tokenizer_note(folder: Path) -> str | None:
    """What is to be said of a converted checkpoint's tokenizer, if it can't be used here."""
    if not any(is_copied(path, TOKENIZER) for path in folder.iterdir()):
        return "the checkpoint has no tokenizer, and so the GQE checkpoint has none"
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UNLOADABLE as error:
        return f"the tokenizer was copied as it is, and can't be loaded here ({reason(error)})"
    return None


def copied_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in filter(is_copied, folder.iterdir()))


def copy_beside(folder: Path, building: Path) -> None:
    """Tokenizer, chat templates, generation settings and licence."""
    for path in folder.iterdir():
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, building / path.name)
        elif is_copied(path):
            shutil.copyfile(path, building / path.name)
