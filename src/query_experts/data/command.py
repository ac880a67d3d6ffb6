"""`query-experts data`: what its actions do and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common.formatting import plural, short, storage, whole
from query_experts.data.checking import check_folder
from query_experts.data.facts import TokensInfo
from query_experts.data.folder import TokenFolder
from query_experts.data.preparation import Prepared, prepare_folder
from query_experts.data.settings import DataSettings
from query_experts.data.shards import token_dtype
from query_experts.data.token_settings import TokenSettings
from query_experts.data.workers import default_workers

if TYPE_CHECKING:
    from rich.console import Console


def prepare_tokens(settings: DataSettings, console: Console) -> None:
    """Makes a folder of tokens, or goes on with it, and prints what it holds."""
    from rich.text import Text
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Path(str(settings.out))
    prepared = prepare_folder(
        settings.data,
        out,
        TokenSettings(
            vocab_size=settings.vocab_size,
            tokenizer=settings.tokenizer,
            validation_fraction=settings.validation_fraction,
            max_bytes=settings.max_bytes,
            shard_bytes=round(1e6 * settings.shard_megabytes),
            text_field=settings.text_field,
        ),
        validation=settings.validation,
        workers=settings.workers or default_workers(),
        say=lambda sentence: console.print(Text(sentence)),
    )
    if prepared.seconds is None:
        console.print(Text(f"{out} holds these tokens already, finished."))
    _print_summary(prepared, console)
    size = prepared.tokens.info.vocab_size
    console.print(Text(f"Train on them: query-experts train --data {out} --vocab_size {size}"))


def check_tokens(settings: DataSettings, console: Console) -> None:
    """Compares the files of a folder of tokens with their checksums."""
    from rich.text import Text

    (folder,) = settings.data
    tokens = check_folder(Path(folder).expanduser())
    console.print(
        Text(f"{folder}: {plural(len(tokens.sizes), 'file')}, {storage(sum(tokens.sizes.values()))}, all as written.")
    )


def _print_summary(prepared: Prepared, console: Console) -> None:
    from rich import box
    from rich.table import Table

    info = prepared.tokens.info
    table = Table("", "train", "validation", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, train, validation in _by_split(info, prepared.tokens):
        table.add_row(name, train, validation)
    console.print(table)
    for line in _of_all(info, prepared):
        console.print(line, markup=False, highlight=False)


def _by_split(info: TokensInfo, tokens: TokenFolder) -> list[tuple[str, str, str]]:
    return [
        ("documents", whole(info.train_documents), whole(info.validation_documents)),
        ("text", storage(info.train_bytes), storage(info.validation_bytes)),
        ("tokens", whole(info.train_tokens), whole(info.validation_tokens)),
        ("shards", whole(len(tokens.shards["train"])), whole(len(tokens.shards["validation"]))),
    ]


def _of_all(info: TokensInfo, prepared: Prepared) -> list[str]:
    width = "uint16" if prepared.tokens.dtype == token_dtype(1) else "uint32"
    lines = [
        f"{plural(info.duplicate_documents, 'exact duplicate')} dropped; vocabulary {whole(info.vocab_size)}, {width}; "
        f"{storage(sum(prepared.tokens.sizes.values()))} on disk",
        f"data_hash {info.data_hash}",
    ]
    if prepared.seconds is not None:
        total = info.train_tokens + info.validation_tokens
        lines.append(f"{short(total)} tokens; this call took {prepared.seconds:,.0f} s")
    return lines
