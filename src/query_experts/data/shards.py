"""Token shards: writes token ids to files of bounded size and reads them back as sequences of one length."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from query_experts.common.files import sync_file

_READ_BYTES = 1 << 20


def token_dtype(vocab_size: int) -> str:
    """The numpy dtype of a token on disk: little-endian uint16 where `vocab_size` ids fit, else uint32."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class ShardWriter:
    """Appends token ids to `folder/name-00000.bin`, `folder/name-00001.bin`, ..., each at most `shard_bytes` long.

    A shard holds only the ids, in the byte order and width of `dtype`. `tokens` counts the ids written so far. `hash`
    digests them and doesn't depend on the shard size. Raises OSError for a disk error.
    """

    def __init__(self, folder: Path, name: str, dtype: str, shard_bytes: int) -> None:
        self.shards: list[str] = []
        self.tokens = 0
        self.hash = hashlib.sha256()
        self._hashes: list[Any] = []  # of the shards
        self._unsynced: set[str] = set()
        self.dtype = np.dtype(dtype)
        self._folder, self._name = folder, name
        self._shard_tokens = shard_bytes // self.dtype.itemsize

    @property
    def written_bytes(self) -> int:
        """Bytes on disk so far."""
        return self.tokens * self.dtype.itemsize

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each shard so far, in hex."""
        return {name: shard.hexdigest() for name, shard in zip(self.shards, self._hashes, strict=True)}

    def append(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append `ids`; start a new shard whenever one is full."""
        block = np.asarray(ids, dtype=self.dtype)
        while block.size:
            room = self._room()
            part, block = block[:room], block[room:]
            with (self._folder / self.shards[-1]).open("ab") as shard:
                shard.write(part.tobytes())
            self._unsynced.add(self.shards[-1])
            self._count(part.tobytes())

    def go_on(self, tokens: int, seen: Callable[[int], Any] = lambda size: None) -> None:
        """Reads what an earlier writer has written, up to `tokens` ids, and removes the rest.

        Args:
            tokens: number of ids that are known to be on disk.
            seen: called with the number of bytes that were read.

        Raises ValueError, with the name of a shard, where fewer ids are on disk.
        """
        while self.tokens < tokens:
            length = min(self._room(), tokens - self.tokens) * self.dtype.itemsize
            path = self._folder / self.shards[-1]
            if not path.is_file() or path.stat().st_size < length:
                raise ValueError(path.name)
            os.truncate(path, length)
            with path.open("rb") as shard:
                while block := shard.read(_READ_BYTES):
                    self._count(block)
                    seen(len(block))
        for path in self._folder.glob(f"{self._name}-*.bin"):
            if path.name not in self.shards:
                path.unlink()

    def sync(self) -> None:
        """Returns when all that was appended is on the disk."""
        for name in self._unsynced:
            sync_file(self._folder / name)
        self._unsynced.clear()

    def _room(self) -> int:
        """How many more ids the last shard takes; names a new one where that is full."""
        used = self.tokens % self._shard_tokens
        if used == 0 and self.tokens == len(self.shards) * self._shard_tokens:
            self.shards.append(f"{self._name}-{len(self.shards):05d}.bin")
            self._hashes.append(hashlib.sha256())
        return self._shard_tokens - used

    def _count(self, encoded: bytes) -> None:
        self.hash.update(encoded)
        self._hashes[-1].update(encoded)
        self.tokens += len(encoded) // self.dtype.itemsize


class TokenSequences(Dataset[dict[str, torch.Tensor]]):
    """Consecutive, non-overlapping sequences of `seq_len` tokens over memory-mapped shards.

    A sequence may span shards, but not parts. Tokens left over after the last whole sequence of a part are never
    returned. Each process opens the shards on first use, so a pickled copy is small and DataLoader workers open their
    own.

    `dataset[i]` is `{"input_ids": int64 [seq_len], "labels": the same tensor}`; it raises IndexError out of range.

    Args:
        shards: files of token ids, in order, as `ShardWriter` writes them.
        dtype: numpy dtype of an id on disk, as `token_dtype` gives it.
        seq_len: tokens in a sequence.
        parts: number of tokens in each part, in order; None for one part.

    Attributes:
        tokens: number of all tokens, including those left over.
    """

    def __init__(self, shards: Sequence[Path], dtype: str, seq_len: int, parts: Sequence[int] | None = None) -> None:
        self.shards = [Path(shard) for shard in shards]
        self.dtype = dtype
        self.seq_len = seq_len
        width = np.dtype(dtype).itemsize
        self._ends = list(accumulate(shard.stat().st_size // width for shard in self.shards))
        self.tokens = self._ends[-1] if self._ends else 0
        sizes = [self.tokens] if parts is None else parts
        self._part_starts = [0, *accumulate(sizes)]
        self._part_sequences = [0, *accumulate(size // seq_len for size in sizes)]
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return self._part_sequences[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"sequence {index} of {length}")
        ids = torch.from_numpy(self._read(self._start(index % length)))
        return {"input_ids": ids, "labels": ids}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def _start(self, index: int) -> int:
        part = bisect_right(self._part_sequences, index) - 1
        return self._part_starts[part] + (index - self._part_sequences[part]) * self.seq_len

    def _read(self, start: int) -> np.ndarray:
        ids = np.empty(self.seq_len, dtype=np.int64)
        filled = 0
        shard = bisect_right(self._ends, start)
        while filled < self.seq_len:
            offset = start + filled - (self._ends[shard - 1] if shard else 0)
            part = self._map(shard)[offset : offset + self.seq_len - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return ids

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.shards[shard], dtype=self.dtype, mode="r")
        return self._maps[shard]
