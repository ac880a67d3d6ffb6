"""The settings of `query-experts data`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from query_experts.common.errors import SettingError
from query_experts.common.fields import Bounds, Count, NotEmpty, Settings, argument, option
from query_experts.common.settings import validate

SHARD_MEGABYTES = 500.0  # training holds each shard open, and a process may hold 1024 files


@dataclass
class DataSettings(Settings):
    """`query-experts data`."""

    action: Literal["prepare", "check"] = argument(
        "prepare: tokenise text once into a folder for --data, or go on with it; check: compare a folder's files with "
        "their checksums"
    )
    data: list[str] = argument(
        "prepare: text files or folders, or hub datasets, owner/name or owner/name:config; check: a folder of tokens"
    )
    validation: list[str] = option(
        [], "text files or folders that are held out whole, up to 400,000 tokens of each file, in place of a share of "
            "data", "data", metavar="PATH",
    )  # fmt: skip
    validation_fraction: Annotated[float, Bounds(above=0, below=1)] = option(
        0.02, "share of data that is held out, without --validation", "data"
    )
    text_field: str = option("text", "field of a jsonl line or parquet column that holds the text", "data")
    tokenizer: Annotated[str, NotEmpty("be a tokenizer's name or folder")] | None = option(
        None, "tokenizer by name or folder; default: a byte-level BPE trained on the first 10 MB", "data",
        metavar="NAME",
    )  # fmt: skip
    vocab_size: Annotated[int, Bounds(least=257)] = option(
        4096, "vocabulary of the BPE that is trained without --tokenizer", "data"
    )
    max_bytes: Count | None = option(None, "read at most N bytes of text; default: all of it", "data")
    shard_megabytes: Annotated[float, Bounds(least=0.001)] = option(
        SHARD_MEGABYTES, "largest size of a file of tokens", "output"
    )
    workers: Count | None = option(
        None, "processes that tokenise; default: the CPU cores, 16 at most", "machine"
    )  # fmt: skip
    out: Annotated[str, NotEmpty("be a folder")] | None = option(
        None, "prepare: required: folder for the tokens", "output", metavar="FOLDER"
    )

    def check(self) -> None:
        """Raises SettingError, naming the field, what it held and what is allowed."""
        validate(self)
        if self.action == "prepare":
            if self.out is None:
                raise SettingError("out isn't given; it must be a folder for the tokens")
            return
        if len(self.data) != 1:
            raise SettingError(f"data holds {self.data}; for data check it must be one folder of tokens")
        plain = DataSettings(self.action, self.data)
        for name in (f.name for f in fields(self)):
            if getattr(self, name) != getattr(plain, name):
                raise SettingError(f"{name} is {getattr(self, name)!r}, which belongs to data prepare; leave it out")
