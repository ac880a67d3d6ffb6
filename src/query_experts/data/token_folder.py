"""The folder of `data prepare`: whose it is, what its tokens are made of, and whether they are begun or finished."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from query_experts.common.errors import SettingError
from query_experts.common.files import PART, no_empty_folders, read_json, write_json
from query_experts.data.folder import META, SOURCE, UNFINISHED, TokenFolder, missing_files, read_meta
from query_experts.data.made_of import changes, describe
from query_experts.data.readers import hub_revision
from query_experts.data.sources import Sources
from query_experts.data.token_settings import TokenSettings

DIGESTS, LOCK, TOKENIZER = ".digests", ".lock", "tokenizer"
REMOVE = "remove the folder to begin again"
_NEW_FOLDER = "it must be a new or empty folder, or one that data prepare began"


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Reserves a folder for this process; one that stays empty is removed. Raises SettingError for other folders."""
    if out.exists() and not out.is_dir():
        raise SettingError(f"out is {out}, which is a file; it must be a folder")
    with no_empty_folders(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            parts = {part for name in (UNFINISHED, SOURCE, META) for part in out.glob(f"{name}.*{PART}")}
            names = {path.name for path in {*out.iterdir()} - parts} - {LOCK}
            if names and not names & {UNFINISHED, META}:
                raise SettingError(f"out is {out}, which holds other files; {_NEW_FOLDER}")
            lock = FileLock(out / LOCK)
            lock.acquire(timeout=0)
            for part in parts:  # of a process that was killed while it wrote it
                part.unlink(missing_ok=True)
        except Timeout as error:
            raise SettingError(f"out is {out}, in which another process is at work; wait for it") from error
        except OSError as error:
            raise cannot_write(out, error) from error
        try:
            yield
        finally:
            with suppress(OSError):
                if not (out / UNFINISHED).exists():
                    (out / LOCK).unlink()
            lock.release()


def cannot_write(out: Path, error: OSError) -> SettingError:
    return SettingError(
        f"out is {out}, where the tokens can't be written ({error.strerror or error}); it must be a folder that can be "
        "made or written to"
    )


def begin(out: Path, settings: TokenSettings, sources: Sources, held_out: Sources | None) -> list[str | None]:
    """Writes what the tokens are made of, or compares it. Returns the commit of each hub data set.

    Raises SettingError where something has changed since the folder was begun.
    """
    if (out / META).exists() and not (out / SOURCE).is_file():
        raise SettingError(f"out is {out}, which holds tokens that data prepare didn't make; {_NEW_FOLDER}")
    if not is_begun(out):
        clear(out)
        revisions = [hub_revision(name) for name, _ in sources.hub]
        made_of = describe(settings, sources, held_out, revisions)
        try:
            write_json(out / UNFINISHED, {})
            write_json(out / SOURCE, made_of)
        except OSError as error:
            raise cannot_write(out, error) from error
        return revisions
    before = read_json(out / SOURCE, "prepare into another folder")
    try:
        pinned = {(name, config): revision for name, config, revision in before["hub"]}
        revisions = [pinned.get(name) for name in sources.hub]
        changed = changes(before, describe(settings, sources, held_out, revisions))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingError(f"out holds {out / SOURCE}, which data prepare didn't write; {_NEW_FOLDER}") from error
    if changed:
        raise SettingError(
            f"out is {out}, which was begun with another source or other settings ({changed}); prepare into another "
            "folder, or with what was"
        )
    return revisions


def is_begun(out: Path) -> bool:
    """Whether a folder holds tokens that must not be lost, so that nothing they are made of may change."""
    if (out / META).exists():
        return True
    if not (out / UNFINISHED).exists():
        return False
    state = read_json(out / UNFINISHED, REMOVE)
    return bool(state) and state["mark"]["documents"]["documents"] > 0


def clear(out: Path) -> None:
    """Removes what was written before the first tokens that count, for another try."""
    for path in (*out.glob("*.bin"), *(out / name for name in (SOURCE, DIGESTS, UNFINISHED))):
        path.unlink(missing_ok=True)
    for name in (TOKENIZER, f".{TOKENIZER}"):
        shutil.rmtree(out / name, ignore_errors=True)


def finished_folder(out: Path) -> TokenFolder | None:
    """The folder's meta.json, if it is finished. Raises SettingError where a file is missing since."""
    tokens = read_meta(out)
    if tokens is None:
        return None
    if missing := missing_files(out, tokens):
        raise SettingError(
            f"out is {out}, which was finished and now lacks {missing[0]} or a part of it; remove the folder to make "
            "it again"
        )
    remove_state(out)
    return tokens


def remove_state(out: Path) -> None:
    for name in (DIGESTS, UNFINISHED):
        (out / name).unlink(missing_ok=True)
