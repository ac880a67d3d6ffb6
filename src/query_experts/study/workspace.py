"""The folder of a run: one process at a time, and one set of settings for everything in it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, parse_json
from query_experts.common.settings import presets, read_recipe
from query_experts.distributed.ranks import is_first
from query_experts.study.settings import CompareSettings, DistillSettings, RunSettings, TrainSettings

LOCK = ".lock"
RANKS = "processes with data of their own"
PLAN = ("plan.json", "plan.png", "plan.svg")  # what `plan` writes, maybe to where the run will be
TELLING = ("arm and seed", "init", "teacher")  # tell the commands apart
# places, what computes, what is watched, the number of results, and what the hash of the data covers
FREE_TO_CHANGE = {"out", "device", "kernels", "stop_after_minutes", "arms", "seeds", "arm", "seed",
                  "prefill_lengths", "prefill_repeats", "data", "validation", "tokenizer", "cache_dir",
                  "fsdp_size", "tp_size", "rank_timeout_minutes", "activation_checkpointing", "keep",
                  "global_batch_size", "report_to", "telemetry", "log_every", "peak_flops"}  # fmt: skip


def fingerprint(settings: RunSettings) -> dict[str, Any]:
    """What settings.json holds: all that must not change while the folder holds results.

    The keys of `train` include those of `distill`, since both wrote their folders as one command.
    """
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE_TO_CHANGE}
    kept |= batch_fingerprint(settings)
    one: Any = "several"
    if isinstance(settings, TrainSettings):
        kept |= settings.elsewhere.defaults
        one = [settings.arm, settings.seed]
    elif isinstance(settings, DistillSettings):
        one = [settings.elsewhere.defaults["arm"], settings.seed]
    return kept | {"device": settings.torch_device, "dtype": settings.autocast_dtype(), "arm and seed": one}


def batch_fingerprint(settings: RunSettings) -> dict[str, Any]:
    """What of an optimizer step's sequences must stay: with `global_batch_size` their number, else each part of it."""
    if settings.global_batch_size is not None:
        return {
            "global_batch_size": settings.global_batch_size,
            "batch_size": None,
            "gradient_accumulation_steps": None,
        }
    ranks = settings.data_parallel_ranks
    return {RANKS: ranks} if ranks > 1 else {}


def _change(name: str, before: Any, now: Any) -> str:
    if name == "data_hash":
        return f"data or validation holds other text, whose tokens' hash was {str(before)[:12]}, now {str(now)[:12]}"
    if name == RANKS:
        return f"{name} were {before or 1}, now {now or 1}, which only global_batch_size would allow"
    return f"{name} was {before!r}, now {now!r}"


def refuse_change(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises SettingError naming each setting with which the results in the folder were made differently.

    Args:
        before: What settings.json holds. A setting that it lacks, as an earlier version had none, had its default.
        now: The fingerprint of the settings.
    """
    before = {name: value for name, value in _defaults().items() if name in now} | before
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if "global_batch_size" in changed:  # which stands for these
        changed = [name for name in changed if name not in ("batch_size", "gradient_accumulation_steps", RANKS)]
    if changed:
        what = "a run with other settings"
        if (command := _command(before)) != _command(now):
            what = f"what {command} has made"
            changed = [name for name in changed if name in TELLING]
        listing = "; ".join(_change(name, before.get(name), now.get(name)) for name in changed)
        raise SettingError(f"out is {folder}, which holds {what} ({listing}); use another folder")


def _command(kept: dict[str, Any]) -> str:
    """The command that a fingerprint is of."""
    if kept.get("arm and seed") == "several":
        return "compare"
    return "train" if kept.get("init") is None else "distill"


def _defaults() -> dict[str, Any]:
    """Name -> default of every setting that isn't a list."""
    kinds = (CompareSettings, DistillSettings, TrainSettings)
    own = {f.name: f.default for kind in kinds for f in fields(kind) if f.default is not MISSING}
    return own | TrainSettings.elsewhere.defaults


def go_on_with_first_demo(settings: RunSettings) -> None:
    """Takes the first demo's values, which are the defaults, for a folder that it began.

    Only for what the demo of today sets in place of the user.
    """
    file = Path(settings.out) / "settings.json"
    try:
        held = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a new folder; a damaged file is named later
    for name, value in read_recipe(presets("recipes")["demo"]).items():
        default = _defaults().get(name)
        unset = name not in settings.given and getattr(settings, name, None) == value
        if unset and default is not None and isinstance(held, dict) and held.get(name, default) == default:
            setattr(settings, name, default)


@contextmanager
def own_folder(out: Path) -> Iterator[Path]:
    """Reserves `out` for this process, or for the ranks of this launch by their first one.

    A refusal before anything was written leaves no folder, and no lock in one.

    Raises SettingError where another process is at work, or where `out` isn't the folder of a run.
    """
    if not is_first():
        yield out
        return
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
        others = [path.name for path in out.iterdir() if path.name not in ("cache", LOCK, *PLAN)]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise SettingError(
            f"out is {out}, which can't be made or read ({error.strerror}); it must be a folder that can be written to"
        ) from error
    if others and not (out / "settings.json").exists():
        raise SettingError(f"out is {out}, which holds other files; it must be an empty or new folder, or a run's")


def holds_results(out: Path) -> bool:
    """Whether training has begun in a run's folder, so that its settings must stay."""
    return any((out / name).exists() for name in ("runs", "checkpoints", "result.json"))
