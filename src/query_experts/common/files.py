"""Writes files completely or not at all, checks disk space, and reports disk errors as OSError."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from query_experts.common.errors import SettingError

_READ_BYTES = 1 << 20
PART = ".part"  # ending of a file that is being written
TRIES = 9  # before an error counts that another process may have caused


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text next to the target, to the disk, then rename it into place. Creates the folder.

    `?` stands for what isn't UTF-8, as in the name of a file of text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    sync_file(temporary)
    os.replace(temporary, path)


def sync_file(path: Path) -> None:
    """Returns when the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Returns when the files in a folder, and their names, are on the disk."""
    for path in folder.iterdir():
        sync_file(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk, where the system can tell."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def checksum_of(paths: Iterable[Path], seen: Callable[[int], Any] = lambda size: None) -> str:
    """The SHA-256 of the content of files, one after another, in hex. seen: called with the bytes of each part."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                seen(len(block))
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_text` does. Raises ValueError for numbers that JSON can't hold."""
    write_text(path, json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")


def parse_json(text: str) -> Any:
    """The value of a text in JSON. Raises ValueError for every fault, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read an object that `write_json` wrote. Raises SettingError, ending in the remedy, for a damaged file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"out holds {path}, which is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise SettingError(f"out holds {path}, which is damaged (no JSON object); {remedy}")
    return value


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """On exit, remove those of a folder and its parents that didn't exist before and are empty."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def require_writable(folder: Path, name: str = "out") -> None:
    """Raises SettingError, naming the setting, for a folder that nothing can be written to. Leaves no file."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{name} is {folder}, which is a file; it must be a folder")
    for last in (*TRIES * [False], True):
        try:
            with no_empty_folders(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder):
                    return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            if error.errno == errno.ENOENT and not last:  # another process has removed the folder after its own check
                continue
            raise SettingError(
                f"{name} is {folder}, which can't be written to ({error.strerror}); it must be a folder that can be"
            ) from error


def require_space(folder: Path, num_bytes: int, out: str | None = None) -> None:
    """Check the free space of a folder's disk. Creates the folder.

    out: the name under which the user knows the folder. Raises SettingError if fewer than `num_bytes` are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SettingError(
            f"out is {out or folder}, whose disk has {free / 1e6:.1f} MB free; it needs about {num_bytes / 1e6:.1f} MB"
        )


FULL_DISK_MESSAGES = ("unexpected pos ", "iostream error", "Writer failed writing")  # of torch.save


@contextmanager
def disk_errors_as_os_errors(folder: Path) -> Iterator[None]:
    """Raises OSError for disk errors that safetensors and torch report in errors of their own.

    torch's of a checkpoint of several ranks holds each rank's, and is no Exception; of others it makes a RuntimeError.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if (number := _disk_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error
    except BaseException as error:
        if (first := _first_failure(error)) is None:
            raise
        if (number := _disk_error(first)) is None:
            raise RuntimeError(f"{type(first).__name__}: {first}") from error
        raise OSError(number, os.strerror(number), str(folder)) from error


def _disk_error(error: BaseException) -> int | None:
    """The number of the disk error that an error tells of, if it does."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match is None and not any(message in str(error) for message in FULL_DISK_MESSAGES):
        return None
    return int(match[1]) if match is not None else errno.ENOSPC


def _first_failure(error: BaseException) -> BaseException | None:
    """The first rank's error in torch's error of a checkpoint; None for any other."""
    if isinstance(error, Exception | KeyboardInterrupt | SystemExit | GeneratorExit):
        return None
    from torch.distributed.checkpoint.api import CheckpointException  # slow to import

    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a fast tokenizer, after a check of the free space: the tokenizers package raises no OSError for a full disk.

    Raises OSError (ENOSPC) if less than twice the tokenizer's size is free.
    """
    size = len(tokenizer.backend_tokenizer.to_str().encode())
    if shutil.disk_usage(folder).free < 2 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    tokenizer.save_pretrained(folder)
