"""A folder of tokens: the shards of both splits, the tokenizer, and meta.json, which describes them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from query_experts.common.files import checksum_of, parse_json, write_text
from query_experts.data.documents import SPLITS, Split
from query_experts.data.facts import TokensInfo, ValidationFile
from query_experts.data.shards import ShardWriter, token_dtype

META = "meta.json"
SOURCE = "source.json"  # what `data prepare` made the tokens of
UNFINISHED = ".preparing.json"  # how far `data prepare` is


@dataclass(frozen=True)
class TokenFolder:
    """The content of `meta.json`.

    shards: split -> its files in order. sizes: path of each file in the folder -> its bytes. sha256: path -> the file's
    SHA-256 in hex; empty in a folder of an earlier version.
    """

    info: TokensInfo
    dtype: str
    shards: dict[Split, list[str]]
    sizes: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)


def read_folder(folder: Path) -> TokenFolder | None:
    """The folder's meta.json; None unless a build wrote it and each file that it lists has its full length."""
    tokens = read_meta(folder)
    return None if tokens is None or missing_files(folder, tokens) else tokens


def read_meta(folder: Path) -> TokenFolder | None:
    """The folder's meta.json; None unless a build wrote it."""
    try:
        meta = parse_json((folder / META).read_text(encoding="utf-8"))
        files = [ValidationFile(**file) for file in meta["info"].get("validation_files", [])]
        info = TokensInfo(**meta["info"] | {"validation_files": files})
        checksums = dict(meta.get("sha256", {}).items())
        return TokenFolder(info, meta["dtype"], meta["shards"], dict(meta["sizes"].items()), checksums)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def missing_files(folder: Path, tokens: TokenFolder) -> list[str]:
    """The files of a folder of tokens that aren't there, or not in their full length."""

    def is_whole(name: str) -> bool:
        try:
            return (folder / name).stat().st_size == tokens.sizes[name]
        except OSError:
            return False

    return [name for name in tokens.sizes if not is_whole(name)]


def write_folder(folder: Path, info: TokensInfo, writers: Mapping[Split, ShardWriter]) -> TokenFolder:
    """Writes meta.json, when all other files of the folder are written. Hidden files are no part of it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    known = {name: checksum for split in SPLITS for name, checksum in writers[split].checksums.items()}
    tokens = TokenFolder(
        info=info,
        dtype=token_dtype(info.vocab_size),
        shards={split: writers[split].shards for split in SPLITS},
        sizes={name: path.stat().st_size for name, path in files.items()},
        sha256={name: known.get(name) or checksum_of([path]) for name, path in files.items()},
    )
    meta = asdict(tokens)
    if not info.validation_files:  # so that earlier versions read it
        del meta["info"]["validation_files"]
    write_text(folder / META, json.dumps(meta, indent=1) + "\n")
    return tokens


def hash_of(writers: Mapping[Split, ShardWriter], vocab_size: int, files: Sequence[ValidationFile]) -> str:
    """The `data_hash` of what was written."""
    return data_hash(token_dtype(vocab_size), [writers[split].hash.hexdigest() for split in SPLITS], files)


def data_hash(dtype: str, splits: Sequence[str], files: Sequence[ValidationFile]) -> str:
    """The `data_hash` of tokens. splits: the SHA-256 of each split's tokens, in hex."""
    hashes = "".join([dtype, *splits])
    hashes += json.dumps([[file.name, file.tokens] for file in files]) if files else ""
    return hashlib.sha256(hashes.encode()).hexdigest()
