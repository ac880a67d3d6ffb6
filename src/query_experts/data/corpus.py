"""`prepare`: checks the settings, tokenises the text or finds its tokens in the cache, and returns the corpus."""

import errno
import hashlib
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, save_tokenizer
from query_experts.common.formatting import plural
from query_experts.data.documents import SPLITS, Split, SplitDocuments
from query_experts.data.facts import CorpusInfo, TokensInfo, ValidationFile, ValidationPart
from query_experts.data.folder import (
    UNFINISHED,
    TokenFolder,
    hash_of,
    missing_files,
    read_folder,
    read_meta,
    write_folder,
)
from query_experts.data.readers import name_without_endings
from query_experts.data.shards import ShardWriter, TokenSequences, token_dtype
from query_experts.data.sources import SourceFile, Sources, find_sources
from query_experts.data.token_settings import TokenSettings, check_value, is_whole
from query_experts.data.tokenizing import (
    TRAINING_BYTES,
    Tokens,
    load_fast_tokenizer,
    tokenize_documents,
    train_bpe,
    vocabulary_size,
)
from query_experts.data.validation_files import ValidationReader, find_validation_files, validation_fingerprint

_LAYOUT = 2  # version of the cache folder's layout, part of its name: folders of another layout are never found
_BUILDING = ".building-"  # prefix of a folder that is still being written
_ABANDONED_SECONDS = 24 * 3600
_TOKEN_BYTES_PER_TEXT_BYTE = 0.6  # a token is 2 bytes on disk and stands for about 3 bytes of text


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, split into training and validation sequences.

    Attributes:
        train, validation: the splits, as sequences of int64 [seq_len].
        tokenizer: the tokenizer that made the tokens.
        facts: where the text comes from and how much of it there is.
    """

    train: TokenSequences
    validation: TokenSequences
    tokenizer: PreTrainedTokenizerFast
    facts: CorpusInfo

    @property
    def info(self) -> dict[str, Any]:
        """The facts as a dictionary that JSON can hold, in the order of `CorpusInfo`."""
        return asdict(self.facts)

    @property
    def validation_parts(self) -> list[ValidationPart]:
        """The sequences of each validation file, in the order of `validation`; empty without validation files."""
        files = self.facts.validation_files
        counts = [file.tokens // self.facts.seq_len for file in files]
        return [
            ValidationPart(file.name, end - count, count, file.tokens, file.bytes)
            for file, count, end in zip(files, counts, accumulate(counts), strict=True)
        ]


def prepare(
    data: Sequence[str] | None,
    *,
    cache_dir: Path,
    seq_len: int,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    validation_fraction: float = 0.02,
    max_bytes: int | None = None,
    shard_bytes: int = 60_000_000,
    text_field: str = "text",
    validation: Sequence[str] = (),
    progress: bool = True,
) -> Corpus:
    """Tokenise text once into `cache_dir` and return it as sequences of `seq_len` tokens.

    Order: files come in a fixed shuffled order, by a hash of their relative paths. So the text up to `max_bytes` is a
    sample of a folder. Documents within a file keep their order; hub data sets come last.

    Split: a document is held out if a hash of its text falls in the lowest `validation_fraction`, independent of the
    order. Exact duplicates are kept once. With two documents or more, each split has at least one. The last
    `validation_fraction` of each document, from a line break on, is held out instead in two cases: all sources are
    files of one document each and fewer than 50 of them are read, or there is only one document. With `validation`,
    nothing of `data` is held out.

    Validation files: each is a part of the validation split, named as the file without its endings. Parts are ordered
    by name, and no sequence spans two. A file gives its first 400,000 tokens at most, in whole documents; only a first
    document that is longer is cut. Exact duplicates are kept once on each side, and refused across the sides.

    Cache: the folder's name depends on the settings (not on `seq_len`) and on each file's relative path, size and
    modification time. Any change there builds another folder. A hub data set counts as unchanged while its name is.

    Memory: one batch of documents, or one whole text file, or 10 MB of text while the BPE trains; and a 16-byte hash
    for each document.

    A failed build leaves nothing behind. Tokens that are too few for `seq_len` stay cached for a shorter one.

    Args:
        data: what to read. Files, or folders (recursive, also through links, without hidden files and what links to
            hidden folders), each file once, whatever names and links lead to it: .txt, .md and .py (a file is one
            document), .jsonl (a line is one) and .parquet (a row is one), each also with .gz, .xz or .zst. Hub
            data sets, as owner/name or owner/name:config, whose train split is streamed. One folder of
            tokens that an earlier call made in its `cache_dir`, or `query-experts data prepare`: its tokens are used as
            they are, so a machine without the text can use them too; of the settings only `seq_len` applies then. None
            reads the source code of this machine's Python standard library.
        cache_dir: folder for the tokens.
        seq_len: tokens in a sequence, 2 or more.
        vocab_size: ids of the BPE that is trained, 257 or more; ignored with a given tokenizer.
        tokenizer: a name or folder for AutoTokenizer; None trains a byte-level BPE on the first 10 MB of the training
            split. Each document ends with the tokenizer's eos token.
        validation_fraction: share of the text that is held out, above 0 and below 1.
        max_bytes: UTF-8 bytes of `data` to read; the document that reaches the limit is cut there, at a line break.
            None reads all.
        shard_bytes: largest size of a file of tokens, 4 or more.
        text_field: field of a .jsonl line, or column of a .parquet file, that holds the text.
        validation: files, and folders of files, that are held out whole, in the formats of `data`.
        progress: whether to show progress bars on stderr.

    Returns:
        The corpus: both splits, the tokenizer and the facts about them.

    Raises:
        SettingError: for a setting or source that can't be used, for a split or a validation file shorter than one
            sequence, for a document of `data` in a validation file, and for a `cache_dir` that can't be written to or
            whose disk is full.
    """
    settings = TokenSettings(vocab_size, tokenizer, validation_fraction, max_bytes, shard_bytes, text_field)
    check_value("seq_len", seq_len, is_whole(seq_len, 2), "a whole number of tokens, at least 2")
    settings.check()
    if data and len(data) == 1:
        folder = Path(data[0]).expanduser()
        if (tokens := _read_whole(folder)) is not None:
            if validation:
                raise SettingError(
                    f"validation holds {validation!r}, but data is a folder of tokens, which has its own validation "
                    "split; validation must be left out"
                )
            return _open(folder, tokens, seq_len, {})
    for entry in data if isinstance(data, list | tuple) else ():
        if read_meta(Path(entry).expanduser()) is not None:
            raise SettingError(f"data holds {str(entry)!r}, which is a folder of tokens; it must be the only entry")
    sources = find_sources(data)
    held_out = find_validation_files(validation) if validation else None
    folder = Path(cache_dir) / f"corpus-{_fingerprint(settings, sources, held_out)}"
    tokens = read_folder(folder) or _build_into(folder, settings, sources, held_out, progress)
    skipped = Counter(sources.skipped) + Counter(held_out.skipped if held_out else {})
    return _open(folder, tokens, seq_len, dict(skipped.most_common()))


def _read_whole(folder: Path) -> TokenFolder | None:
    """The folder's meta.json; None for a folder of text. Raises SettingError for tokens that aren't all there."""
    tokens = read_meta(folder)
    if tokens is None and (folder / UNFINISHED).exists():
        raise SettingError(
            f"data is {str(folder)!r}, which query-experts data prepare hasn't finished; it goes on by the same command"
        )
    if tokens is not None and (missing := missing_files(folder, tokens)):
        raise SettingError(
            f"data is {str(folder)!r}, which lacks {plural(len(missing), 'file')} of tokens or holds a part of it, "
            f"such as {missing[0]}; all must be there"
        )
    return tokens


def _fingerprint(settings: TokenSettings, sources: Sources, held_out: Sources | None) -> str:
    described: list[object] = [_LAYOUT, settings.fingerprint(), sources.fingerprint()]
    if held_out:
        described += validation_fingerprint(held_out)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]


def _open(folder: Path, tokens: TokenFolder, seq_len: int, skipped: dict[str, int]) -> Corpus:
    info = CorpusInfo(**vars(tokens.info), seq_len=seq_len, skipped_files=skipped)
    files = info.validation_files
    _check_length("train split of data", info.train_tokens, info.train_documents, seq_len)
    for file in files:
        _check_length(f"validation file {file.name!r}", file.tokens, file.documents, seq_len)
    _check_length("validation split of data", info.validation_tokens, info.validation_documents, seq_len)
    parts: dict[Split, list[int] | None] = {"train": None, "validation": [file.tokens for file in files] or None}
    train, validation = (
        TokenSequences([folder / name for name in tokens.shards[split]], tokens.dtype, seq_len, parts[split])
        for split in SPLITS
    )
    load = PreTrainedTokenizerFast if info.tokenizer == "trained" else AutoTokenizer
    return Corpus(train, validation, load.from_pretrained(folder / "tokenizer"), info)


def _check_length(name: str, tokens: int, documents: int, seq_len: int) -> None:
    """Raises SettingError for a split or a validation file that is shorter than one sequence."""
    if tokens < seq_len:
        raise SettingError(
            f"seq_len is {seq_len}, but the {name} has only {tokens} tokens "
            f"({documents} document{'s' * (documents != 1)}); it must be at most that, or give more text"
        )


def _build_into(
    folder: Path, settings: TokenSettings, sources: Sources, held_out: Sources | None, progress: bool
) -> TokenFolder:
    """Build next to `folder` and rename at the end; of two builds at once the first to finish is kept."""
    cache_dir = folder.parent
    building = cache_dir / f"{_BUILDING}{folder.name}-{uuid.uuid4().hex[:8]}"
    build = Build(building, settings, sources, held_out, progress)
    with no_empty_folders(cache_dir):
        try:
            building.mkdir(parents=True)
            _remove_abandoned(cache_dir)
            tokens = build.run()
            _publish(building, folder)
            return tokens
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise SettingError(
                    f"cache_dir is {str(cache_dir)!r}, where the tokens can't be written "
                    f"({error.strerror or error}); it must be a folder that can be made or written to"
                ) from error
            raise SettingError(
                f"cache_dir is {str(cache_dir)!r}, whose disk is full: {build.space_needed()}; "
                "free that much, lower max_bytes or name a folder on another disk"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    """Rename a finished build to its name, unless another build has done so meanwhile."""
    if folder.exists() and read_folder(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if read_folder(folder) is None:
            raise


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove folders of killed builds: those in which nothing has changed for a day."""
    for abandoned in cache_dir.glob(f"{_BUILDING}*"):
        try:
            newest = max(path.stat().st_mtime for path in (abandoned, *abandoned.rglob("*")))
        except OSError:  # another process has just finished or removed it, or this user can't read it
            continue
        if newest < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(abandoned, ignore_errors=True)


class Build:
    """Writes one folder of tokens: tokenizer/, the shards of both splits, then meta.json."""

    def __init__(
        self, folder: Path, settings: TokenSettings, sources: Sources, held_out: Sources | None, progress: bool
    ) -> None:
        self.folder, self.settings, self.sources, self.held_out = folder, settings, sources, held_out
        self.progress = progress
        self.writers: dict[Split, ShardWriter] = {}
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        total, limit = sources.text_bytes(), settings.max_bytes
        self.expected_bytes = limit if total is None else min(total, limit or total)

    def run(self) -> TokenFolder:
        """Write everything and return what meta.json holds. Raises SettingError, and OSError for a disk error."""
        settings = self.settings
        given = None if settings.tokenizer is None else load_fast_tokenizer(settings.tokenizer)
        texts = self.sources.texts(settings.text_field, self.folder)
        tails = self.held_out is None and self.sources.few_documents(settings.max_bytes)
        documents = SplitDocuments(texts, self._fraction(), settings.max_bytes, tails)
        stream = iter(documents)
        sample = [] if given else self._sample(stream)
        tokenizer = given or self._train(sample)
        (self.folder / "tokenizer").mkdir()
        save_tokenizer(tokenizer, self.folder / "tokenizer")
        self._write(tokenizer, _chain(sample, stream))
        if not documents.documents:
            raise SettingError(f"data holds {self.sources.names!r}, in which there is no text; it must hold some")
        files: list[ValidationFile] = []
        if self.held_out is not None:
            reader = ValidationReader(tokenizer, documents.digests, settings.text_field, self.folder)
            files = self._write_files(self.held_out, reader)
            documents.duplicates += reader.duplicates
        return write_folder(self.folder, self._info(documents, files, vocabulary_size(tokenizer)), self.writers)

    def _fraction(self) -> float | None:
        """The share of `data` that is held out; None with validation files."""
        return self.settings.validation_fraction if self.held_out is None else None

    def space_needed(self) -> str:
        """How much disk space the build needs, roughly, as a clause of a sentence."""
        written = sum(writer.written_bytes for writer in self.writers.values())
        clause = f"{written / 1e6:.1f} MB of tokens were written"
        if self.expected_bytes is None:
            return f"{clause} and more is needed"
        per_text_byte = written / sum(self.text_bytes.values()) if written else _TOKEN_BYTES_PER_TEXT_BYTE
        return f"{clause} and roughly {max(written, per_text_byte * self.expected_bytes) / 1e6:.1f} MB is needed"

    def _bar(self, task: str, total: int | None) -> "tqdm[Any]":
        return tqdm(desc=task, total=total, unit="B", unit_scale=True, disable=not self.progress)

    def _sample(self, stream: Iterator[tuple[Split, str, int]]) -> list[tuple[Split, str, int]]:
        """The first documents, until the training split has the bytes that a tokenizer is trained on."""
        sample: list[tuple[Split, str, int]] = []
        train_bytes = 0
        total = min(TRAINING_BYTES, self.expected_bytes or TRAINING_BYTES)
        with self._bar("reading text for the tokenizer", total) as bar:
            for split, text, size in stream:
                sample.append((split, text, size))
                train_bytes += size if split == "train" else 0
                bar.update(size)
                if train_bytes >= TRAINING_BYTES:
                    break
        return sample

    def _train(self, sample: list[tuple[Split, str, int]]) -> PreTrainedTokenizerFast:
        with tqdm(sample, desc="training the tokenizer", unit=" documents", disable=not self.progress) as bar:
            return train_bpe((text for split, text, _ in bar if split == "train"), self.settings.vocab_size)

    def _write(self, tokenizer: PreTrainedTokenizerFast, documents: Iterable[tuple[Split, str, int]]) -> None:
        dtype = token_dtype(vocabulary_size(tokenizer))
        self.writers = {split: ShardWriter(self.folder, split, dtype, self.settings.shard_bytes) for split in SPLITS}
        with self._bar("tokenising text", self.expected_bytes) as bar:
            for tokens in tokenize_documents(documents, tokenizer):
                self._append(tokens)
                bar.set_postfix(documents=sum(self.documents.values()), refresh=False)
                bar.update(tokens.text_bytes)

    def _append(self, tokens: Tokens) -> None:
        self.writers[tokens.split].append(tokens.ids)
        self.documents[tokens.split] += tokens.ends_document
        self.text_bytes[tokens.split] += tokens.text_bytes

    def _write_files(self, held_out: Sources, reader: ValidationReader) -> list[ValidationFile]:
        """Append the validation files to the validation split, one after another."""
        with tqdm(held_out.files, desc="tokenising validation files", disable=not self.progress) as bar:
            return [self._write_file(file, reader) for file in bar]

    def _write_file(self, file: SourceFile, reader: ValidationReader) -> ValidationFile:
        documents = tokens = text_bytes = 0
        for document in reader.documents(file):
            documents += 1
            for piece in document:
                self._append(piece)
                tokens += len(piece.ids)
                text_bytes += piece.text_bytes
        return ValidationFile(name_without_endings(file.path), documents, tokens, text_bytes)

    def _info(self, documents: SplitDocuments, files: list[ValidationFile], vocab_size: int) -> TokensInfo:
        held_out = "tails of the documents" if documents.tails else "held-out documents"
        return TokensInfo(
            source=self.sources.names,
            data_hash=hash_of(self.writers, vocab_size, files),
            tokenizer=self.settings.tokenizer or "trained",
            validation="validation files" if files else held_out,
            validation_fraction=self._fraction(),
            max_bytes=self.settings.max_bytes,
            text_field=self.settings.text_field,
            duplicate_documents=documents.duplicates,
            vocab_size=vocab_size,
            train_documents=self.documents["train"],
            train_tokens=self.writers["train"].tokens,
            train_bytes=self.text_bytes["train"],
            validation_documents=self.documents["validation"],
            validation_tokens=self.writers["validation"].tokens,
            validation_bytes=self.text_bytes["validation"],
            validation_files=files,
        )


def _chain(
    sample: list[tuple[Split, str, int]], rest: Iterator[tuple[Split, str, int]]
) -> Iterator[tuple[Split, str, int]]:
    """The sample, freed from memory document by document, then the rest."""
    sample.reverse()
    while sample:
        yield sample.pop()
    yield from rest
