"""Files that are either whole or not there, and the disk that they go to."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from query_experts.common.errors import SettingError


def write_text(path: Path, text: str) -> None:
    """Write text beside the target and rename it into place. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """As write_text; refuses numbers that JSON can't hold."""
    write_text(path, json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """An object that `write_json` wrote. Raises SettingError, ending in the remedy, where the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"out holds {path}, which is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise SettingError(f"out holds {path}, which is damaged (no JSON object); {remedy}")
    return value


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """Of a folder and those above it that aren't there yet, removes in the end those that are empty."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def require_space(folder: Path, num_bytes: int, out: str | None = None) -> None:
    """Raises SettingError if the disk of the folder has less room than that. out: what the folder is for its user."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SettingError(
            f"out is {out or folder}, whose disk has {free / 1e6:.1f} MB free; it needs about {num_bytes / 1e6:.1f} MB"
        )


FULL_DISK = ("unexpected pos ", "iostream error", "Writer failed writing")  # torch.save


@contextmanager
def disk_errors_as_os_errors(folder: Path) -> Iterator[None]:
    """safetensors and torch.save tell of a disk that refuses in errors of their own kinds, by words alone."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None and not any(words in str(error) for words in FULL_DISK):
            raise
        number = int(told[1]) if told is not None else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(folder)) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a fast tokenizer, after checking for room: the tokenizers package reports a full disk as no OSError.

    Raises OSError (ENOSPC).
    """
    size = len(tokenizer.backend_tokenizer.to_str().encode())
    if shutil.disk_usage(folder).free < 2 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    tokenizer.save_pretrained(folder)
