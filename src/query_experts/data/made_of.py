"""What a folder of tokens is made of, and what of it has changed since."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from query_experts.data.sources import SourceFile, Sources
from query_experts.data.token_settings import TokenSettings
from query_experts.data.tokenizing import load_fast_tokenizer

_NAMED = 3  # changes in a sentence


def describe(
    settings: TokenSettings, sources: Sources, held_out: Sources | None, revisions: list[str | None]
) -> dict[str, Any]:
    """What tokens are made of, as JSON can hold it: settings, the content of a tokenizer's folder, and each source.

    A tokenizer on the hub is known by its name: the folder of tokens has its own copy.
    """
    own = settings.tokenizer is not None and Path(settings.tokenizer).expanduser().exists()
    return {
        "settings": asdict(settings) | ({} if settings.tokenizer is None else {"vocab_size": None}),
        "tokenizer": _tokenizer_hash(str(settings.tokenizer)) if own else None,
        "data": sources.names,
        "files": [_file(file) for file in sources.files],
        "hub": [[name, config, revision] for (name, config), revision in zip(sources.hub, revisions, strict=True)],
        "validation": held_out.names if held_out else [],
        "validation_files": [_file(file) for file in held_out.files] if held_out else [],
    }


def _file(file: SourceFile) -> list[Any]:
    return [file.entry, file.name, file.size, file.mtime_ns]


def _tokenizer_hash(name: str) -> str:
    tokenizer = load_fast_tokenizer(name)
    content = f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(content.encode()).hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The end of a sentence that names what has changed; empty for nothing."""
    found = [*_changes(before, now)]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted(before["settings"].keys() | now["settings"].keys()):
        was, is_now = before["settings"].get(name), now["settings"].get(name)
        if was != is_now:
            yield f"{name} was {was!r}, now {is_now!r}"
    same_name = before["settings"]["tokenizer"] == now["settings"]["tokenizer"]
    if same_name and before["tokenizer"] != now["tokenizer"]:
        hashes = [str(one["tokenizer"])[:12] for one in (before, now)]
        yield f"the content of tokenizer {now['settings']['tokenizer']!r} had the hash {hashes[0]}, now {hashes[1]}"
    for name in ("data", "validation"):
        if before[name] != now[name]:
            yield f"{name} was {before[name]}, now {now[name]}"
    if before["hub"] != now["hub"] and before["data"] == now["data"]:
        yield f"the data sets on the hub were {before['hub']}, now {now['hub']}"
    for name in ("files", "validation_files"):
        yield from _file_changes(before[name], now[name])


def _file_changes(before: list[list[Any]], now: list[list[Any]]) -> Iterator[str]:
    was, is_now = ({(entry, name): (size, time) for entry, name, size, time in files} for files in (before, now))
    for key in sorted(was.keys() | is_now.keys()):
        if was.get(key) != is_now.get(key):
            yield f"file {key[1]!r} {_stat('was', was.get(key))}, {_stat('now', is_now.get(key))}"


def _stat(word: str, stat: tuple[int, int] | None) -> str:
    if stat is None:
        return f"{word} not there"
    return f"{word} {stat[0]:,} bytes of {datetime.fromtimestamp(stat[1] / 1e9).isoformat(' ', 'milliseconds')}"
