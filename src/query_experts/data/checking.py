"""`data check`: compares the files of a folder of tokens with what meta.json says of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from query_experts.common.errors import SettingError
from query_experts.common.files import checksum_of
from query_experts.common.formatting import plural
from query_experts.data.documents import SPLITS
from query_experts.data.folder import TokenFolder, data_hash, missing_files, read_meta

_NAMED = 3  # files in a sentence


def check_folder(folder: Path, progress: bool = True) -> TokenFolder:
    """Reads all files of a folder of tokens. Returns its meta.json.

    A folder of an earlier version has no checksums of its files: its tokens must have their `data_hash` then.

    Raises SettingError for another folder, and one that names the files that are missing, cut or damaged.
    """
    tokens = read_meta(folder)
    if tokens is None:
        raise SettingError(f"data is {str(folder)!r}; it must be a folder of tokens, with a meta.json that is whole")
    faults = [f"{name} is missing or cut" for name in missing_files(folder, tokens)]
    if not faults:
        total = sum(tokens.sizes.values())
        with tqdm(desc="reading tokens", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            faults = (
                _damaged(folder, tokens, bar.update) if tokens.sha256 else _other_tokens(folder, tokens, bar.update)
            )
    if faults:
        more = f" and {plural(len(faults) - _NAMED, 'more file')}" if len(faults) > _NAMED else ""
        raise SettingError(
            f"data is {str(folder)!r}, in which {'; '.join(faults[:_NAMED])}{more}: copy the folder again, or make it "
            "again"
        )
    return tokens


def _damaged(folder: Path, tokens: TokenFolder, seen: Callable[[int], Any]) -> list[str]:
    return [
        f"{name} is damaged (its SHA-256 isn't that of meta.json)"
        for name in tokens.sizes
        if checksum_of([folder / name], seen) != tokens.sha256.get(name)
    ]


def _other_tokens(folder: Path, tokens: TokenFolder, seen: Callable[[int], Any]) -> list[str]:
    splits = [checksum_of([folder / name for name in tokens.shards[split]], seen) for split in SPLITS]
    if data_hash(tokens.dtype, splits, tokens.info.validation_files) == tokens.info.data_hash:
        return []
    return ["a shard is damaged (the data_hash isn't that of meta.json, which has no checksum of each file)"]
