"""Writes a folder of tokens, or a part of it, anew in files of a chosen size, for a machine that can't fetch the text.

The tokenizer and the validation split stay whole, so losses mean the same. A part of the training split is taken as
blocks that are spread evenly over it. The first tokens alone would be the text of the first files alone, and a corpus
that is cut by `max_bytes` has the same fault. The part has a `data_hash` of its own.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from query_experts.common.errors import SettingError
from query_experts.data.documents import SPLITS
from query_experts.data.facts import TokensInfo
from query_experts.data.folder import META, SOURCE, TokenFolder, hash_of, read_folder, write_folder
from query_experts.data.shards import ShardWriter, TokenSequences

BLOCK = 4096  # tokens that stay together; training sequences whose length divides it are sequences of the whole, too


def write_portion(source: Path, target: Path, train_tokens: int | None, shard_bytes: int) -> TokensInfo:
    """Writes a folder of tokens that `prepare` opens as it opens the source.

    Args:
        source: A folder of tokens.
        target: A new folder.
        train_tokens: At most so many training tokens, in whole blocks of 4,096; None for all.
        shard_bytes: Largest size of a file of tokens.

    Returns:
        The facts about what was written. Training documents and their bytes are those of the source, times the share of
        the tokens.

    Raises:
        SettingError: The source is no folder of tokens, the target is there already, or a block is more than
            `train_tokens`.
    """
    tokens = read_folder(source)
    if tokens is None:
        raise SettingError(f"data is {source}; it must be a folder of tokens")
    if target.exists():
        raise SettingError(f"to is {target}, which is there already; it must be a new folder")
    blocks = None if train_tokens is None or train_tokens >= tokens.info.train_tokens else train_tokens // BLOCK
    if blocks == 0:
        raise SettingError(f"tokens is {train_tokens}; it must be {BLOCK} or more")
    building = target.with_name(f".building-{target.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        info = _write(source, building, tokens, blocks, shard_bytes)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return info


def _write(source: Path, folder: Path, tokens: TokenFolder, blocks: int | None, shard_bytes: int) -> TokensInfo:
    shards = {name for split in SPLITS for name in tokens.shards[split]}
    for name in tokens.sizes.keys() - shards - {META, SOURCE}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    writers = {split: ShardWriter(folder, split, tokens.dtype, shard_bytes) for split in SPLITS}
    for split in SPLITS:
        files = [source / name for name in tokens.shards[split]]
        taken = blocks if split == "train" else None
        for ids in _all(files, tokens.dtype) if taken is None else _spread(files, tokens.dtype, taken):
            writers[split].append(ids)
    share = writers["train"].tokens / tokens.info.train_tokens
    info = replace(
        tokens.info,
        data_hash=hash_of(writers, tokens.info.vocab_size, tokens.info.validation_files),
        train_tokens=writers["train"].tokens,
        train_documents=round(share * tokens.info.train_documents),
        train_bytes=round(share * tokens.info.train_bytes),
    )
    write_folder(folder, info, writers)
    return info


def _all(files: list[Path], dtype: str) -> Iterator[np.ndarray]:
    for file in files:
        yield np.memmap(file, dtype=dtype, mode="r")


def _spread(files: list[Path], dtype: str, count: int) -> Iterator[np.ndarray]:
    blocks = TokenSequences(files, dtype, BLOCK)
    for number in range(count):
        yield blocks[number * len(blocks) // count]["input_ids"].numpy()
