"""A run's folder: one process at a time, and one set of settings for all that it holds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from query_experts.common.device import resolve_device
from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders
from query_experts.study.settings import RunSettings, TrainSettings

# where results are, how many of them, and what the data hash speaks for
FREE_TO_CHANGE = {"out", "device", "stop_after_minutes", "arms", "seeds", "arm", "seed",
                  "prefill_lengths", "prefill_repeats", "data", "tokenizer", "cache_dir"}  # fmt: skip


def fingerprint(settings: RunSettings) -> dict[str, Any]:
    """What must not change while results of a folder are kept: all but where they are and how many of them."""
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE_TO_CHANGE}
    one = [settings.arm, settings.seed] if isinstance(settings, TrainSettings) else "several"
    return kept | {
        "device": resolve_device(settings.device), "dtype": settings.autocast_dtype(), "arm and seed": one,
    }  # fmt: skip


def _change(name: str, before: Any, now: Any) -> str:
    if name == "data_hash":
        return f"data holds other text, whose tokens' hash was {str(before)[:12]}, now {str(now)[:12]}"
    return f"{name} was {before!r}, now {now!r}"


def refuse_change(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises SettingError naming each setting with which the results in the folder were made differently."""
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        listing = "; ".join(_change(name, before.get(name), now.get(name)) for name in changed)
        raise SettingError(f"out is {folder}, which holds a run with other settings ({listing}); use another folder")


LOCK = ".lock"


@contextmanager
def own_folder(out: Path) -> Iterator[Path]:
    """Has `out` for this process alone. Raises SettingError where another is at work, or it is no run's folder.

    What is refused before anything was written leaves no folder, and no lock in one.
    """
    with no_empty_folders(out):
        require_own_folder(out)
        lock = FileLock(out / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SettingError(
                f"out is {out}, in which another process is at work; wait for it, or use another folder"
            ) from error
        try:
            yield out
        finally:
            with suppress(OSError):
                if [path.name for path in out.iterdir()] == [LOCK]:
                    (out / LOCK).unlink()
            lock.release()


def require_own_folder(out: Path) -> None:
    """Raises SettingError for an `out` that can't be a run's folder, or that holds other files."""
    if out.exists() and not out.is_dir():
        raise SettingError(f"out is {out}, which is a file; it must be a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in out.iterdir() if path.name not in ("cache", LOCK)]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise SettingError(
            f"out is {out}, which can't be made or read ({error.strerror}); it must be a folder that can be written to"
        ) from error
    if others and not (out / "settings.json").exists():
        raise SettingError(f"out is {out}, which holds other files; it must be an empty or new folder, or a run's")


def holds_results(out: Path) -> bool:
    """Whether training has begun in a run's folder, so that its settings must not change any more."""
    return any((out / name).exists() for name in ("runs", "checkpoints", "result.json"))
