"""`prepare`: the settings checked, the corpus found in the cache or built into it, and handed out as sequences."""

import errno
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, save_tokenizer
from query_experts.data.documents import SPLITS, Split, SplitDocuments
from query_experts.data.shards import ShardWriter, TokenSequences, token_dtype
from query_experts.data.sources import Sources, find_sources
from query_experts.data.tokenizing import (
    SMALLEST_VOCABULARY,
    TRAINING_BYTES,
    load_fast_tokenizer,
    tokenize_documents,
    train_bpe,
    vocabulary_size,
)

_LAYOUT = 2  # of a cache folder; a folder of another layout is never found
_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600
_TOKEN_BYTES_PER_TEXT_BYTE = 0.6  # about three bytes of text to a token of two


@dataclass(frozen=True)
class Corpus:
    """Tokenised text: both splits as sequences of int64 [seq_len], the tokenizer, and `info`, which is JSON-able.

    `info` holds: source (list of str, as given, or "python standard library X.Y.Z" alone), data_hash (sha256 hex over
    the tokens, the same on every machine), tokenizer ("trained" or the name given), train_documents,
    validation_documents, duplicate_documents (dropped), train_tokens, validation_tokens, train_bytes and
    validation_bytes (UTF-8 of the text), vocab_size, seq_len, validation ("held-out documents" or "tails of the
    documents"), skipped_files (how many of each other kind, by the ending of their names, lie in the folders), and the
    settings max_bytes, validation_fraction and text_field that the tokens were made with.
    """

    train: TokenSequences
    validation: TokenSequences
    tokenizer: PreTrainedTokenizerFast
    info: dict[str, Any]


@dataclass(frozen=True)
class _Settings:
    """What the tokens on disk depend on besides the source; `seq_len` is not among it."""

    vocab_size: int
    tokenizer: str | None
    validation_fraction: float
    max_bytes: int | None
    shard_bytes: int
    text_field: str

    def check(self) -> None:
        """Raises SettingError for a value of the wrong type or out of range."""
        if self.tokenizer is None:
            allowed = f"a whole number, at least {SMALLEST_VOCABULARY} (256 bytes and the end-of-text token)"
            _require("vocab_size", self.vocab_size, _whole(self.vocab_size, SMALLEST_VOCABULARY), allowed)
        fraction = self.validation_fraction
        fits = isinstance(fraction, int | float) and 0 < fraction < 1
        _require("validation_fraction", fraction, fits, "a number above 0 and below 1")
        fits = self.max_bytes is None or _whole(self.max_bytes, 1)
        _require("max_bytes", self.max_bytes, fits, "a whole number, at least 1, or None")
        _require("shard_bytes", self.shard_bytes, _whole(self.shard_bytes, 4), "a whole number, at least 4")
        fits = isinstance(self.text_field, str) and self.text_field != ""
        _require("text_field", self.text_field, fits, "the name of a field")

    def fingerprint(self) -> list[object]:
        """The settings that matter, and the files of a tokenizer that is a folder."""
        if self.tokenizer is None:
            return [asdict(self)]
        folder = Path(self.tokenizer).expanduser()
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        stats = [(path.name, path.stat()) for path in files]
        return [asdict(self) | {"vocab_size": 0}, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _require(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise SettingError(f"{name} is {value!r}; it must be {allowed}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
    progress: bool = True,
) -> Corpus:
    """Tokenise text once into `cache_dir` and return it as sequences of `seq_len` tokens.

    `data`: files or folders (recursive, hidden files skipped) of .txt, .md, .py (a file is one document), .jsonl (a
    line, its field `text_field`) and .parquet (a row, its column `text_field`), each also with .gz, .xz or .zst; or
    hub data sets as owner/name or owner/name:config, whose train split is streamed. None reads the source of this
    machine's Python standard library. Files come in a fixed shuffled order, by a hash of their relative paths, so the
    text up to `max_bytes` (UTF-8) is a sample of a folder; documents within a file come in order, hub data sets last.
    The document that reaches `max_bytes` is cut there, at a line break.

    Split: a document is held out if a hash of its text falls in the lowest `validation_fraction`, whatever the order;
    exact duplicates are kept once, and of two documents or more each side has one. Where all sources are files of one
    document each and fewer than 50 of them are read, and of an only document, the last `validation_fraction` of each
    document is held out instead, from a line break on.

    `tokenizer`: a name or folder for AutoTokenizer. None trains a byte-level BPE of `vocab_size` on the first 10 MB
    of the training split. Each document ends with the tokenizer's eos token.

    The cache folder is named by the settings (not `seq_len`) and each file's relative path, size and modification
    time; a change builds another. A hub data set counts as unchanged while its name is. Memory holds a batch of
    documents (a text file whole, 10 MB while the BPE trains) and a 16-byte hash for each.

    `data` may also be one folder that an earlier call has filled in its `cache_dir`: its tokens are used as they are,
    so they can be carried, in shards of at most `shard_bytes`, to a machine that hasn't the text. Of the settings only
    `seq_len` applies to them; `info` says what they were made with.

    Raises SettingError for a setting or source that cannot be used, a split shorter than one sequence, and a
    `cache_dir` that cannot be written to or whose disk is full. A failed build leaves nothing behind; tokens too few
    for `seq_len` stay cached for a shorter one.
    """
    settings = _Settings(vocab_size, tokenizer, validation_fraction, max_bytes, shard_bytes, text_field)
    _require("seq_len", seq_len, _whole(seq_len, 2), "a whole number of tokens, at least 2")
    settings.check()
    if data and len(data) == 1:
        given = Path(data[0]).expanduser()
        if (tokens := _read_meta(given)) is not None:
            return _corpus(given, tokens, seq_len, {})
    sources = find_sources(data)
    folder = Path(cache_dir) / f"corpus-{_fingerprint(settings, sources)}"
    meta = _read_meta(folder) or _build_into(folder, settings, sources, progress)
    return _corpus(folder, meta, seq_len, sources.skipped)


def _fingerprint(settings: _Settings, sources: Sources) -> str:
    described = json.dumps([_LAYOUT, settings.fingerprint(), sources.fingerprint()])
    return hashlib.sha256(described.encode()).hexdigest()[:20]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The folder's meta.json, or None unless a build wrote it and each file it lists is there at its full length."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
        return meta if whole and {"info", "dtype", "shards"} <= meta.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _corpus(folder: Path, meta: dict[str, Any], seq_len: int, skipped: dict[str, int]) -> Corpus:
    info = {**meta["info"], "seq_len": seq_len, "skipped_files": skipped}
    for split in SPLITS:
        tokens = info[f"{split}_tokens"]
        if tokens < seq_len:
            documents = info[f"{split}_documents"]
            raise SettingError(
                f"seq_len is {seq_len}, but the {split} split of data has only {tokens} tokens "
                f"({documents} document{'s' * (documents != 1)}); it must be at most that, or give more text"
            )
    train, validation = (
        TokenSequences([folder / name for name in meta["shards"][split]], meta["dtype"], seq_len) for split in SPLITS
    )
    load = PreTrainedTokenizerFast if info["tokenizer"] == "trained" else AutoTokenizer
    return Corpus(train, validation, load.from_pretrained(folder / "tokenizer"), info)


def _build_into(folder: Path, settings: _Settings, sources: Sources, progress: bool) -> dict[str, Any]:
    """Build beside `folder` and rename at the end; of two builders at once the first to finish is kept."""
    cache_dir = folder.parent
    building = cache_dir / f"{_BUILDING}{folder.name}-{uuid.uuid4().hex[:8]}"
    build = _Build(building, settings, sources, progress)
    with no_empty_folders(cache_dir):
        try:
            building.mkdir(parents=True)
            _remove_abandoned(cache_dir)
            meta = build.run()
            _publish(building, folder)
            return meta
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise SettingError(
                    f"cache_dir is {str(cache_dir)!r}, where the tokens can't be written "
                    f"({error.strerror or error}); it must be a folder that can be made or written to"
                ) from error
            raise SettingError(
                f"cache_dir is {str(cache_dir)!r}, whose disk is full: {build.need()}; "
                "free that much, lower max_bytes or name a folder on another disk"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    if folder.exists() and _read_meta(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if _read_meta(folder) is None:
            raise


def _remove_abandoned(cache_dir: Path) -> None:
    """Folders of builds that were killed: nothing in them has changed for a day."""
    for left in cache_dir.glob(f"{_BUILDING}*"):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
        except OSError:  # another process has just finished or removed it, or it is closed to this user
            continue
        if newest < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


class _Build:
    """One build into a folder of its own: tokenizer/, the shards of both splits, then meta.json."""

    def __init__(self, folder: Path, settings: _Settings, sources: Sources, progress: bool) -> None:
        self.folder, self.settings, self.sources = folder, settings, sources
        self.progress = progress
        self.writers: dict[Split, ShardWriter] = {}
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        total, limit = sources.text_bytes(), settings.max_bytes
        self.expected_bytes = limit if total is None else min(total, limit or total)

    def run(self) -> dict[str, Any]:
        """Write everything; returns what meta.json holds. Raises SettingError, and OSError when the disk refuses."""
        settings = self.settings
        given = None if settings.tokenizer is None else load_fast_tokenizer(settings.tokenizer)
        texts = self.sources.texts(settings.text_field, self.folder)
        tails = self.sources.few_documents(settings.max_bytes)
        documents = SplitDocuments(texts, settings.validation_fraction, settings.max_bytes, tails)
        stream = iter(documents)
        sample = [] if given else self._sample(stream)
        tokenizer = given or self._train(sample)
        (self.folder / "tokenizer").mkdir()
        save_tokenizer(tokenizer, self.folder / "tokenizer")
        self._write(tokenizer, _chain(sample, stream))
        if not documents.documents:
            raise SettingError(f"data holds {self.sources.names!r}, in which there is no text; it must hold some")
        return self._write_meta(documents, vocabulary_size(tokenizer))

    def need(self) -> str:
        """How much disk the build needs, roughly, as a clause."""
        written = sum(writer.written_bytes for writer in self.writers.values())
        clause = f"{written / 1e6:.1f} MB of tokens were written"
        if self.expected_bytes is None:
            return f"{clause} and more is needed"
        each = written / sum(self.text_bytes.values()) if written else _TOKEN_BYTES_PER_TEXT_BYTE
        return f"{clause} and roughly {max(written, each * self.expected_bytes) / 1e6:.1f} MB is needed"

    def _bar(self, task: str, total: int | None) -> "tqdm[Any]":
        return tqdm(desc=task, total=total, unit="B", unit_scale=True, disable=not self.progress)

    def _sample(self, stream: Iterator[tuple[Split, str, int]]) -> list[tuple[Split, str, int]]:
        """The documents up to where the training split reaches the bytes that a tokenizer is trained on."""
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
            for split, ids, text_bytes, ended in tokenize_documents(documents, tokenizer):
                self.writers[split].append(ids)
                self.documents[split] += ended
                self.text_bytes[split] += text_bytes
                bar.set_postfix(documents=sum(self.documents.values()), refresh=False)
                bar.update(text_bytes)

    def _write_meta(self, documents: SplitDocuments, vocab_size: int) -> dict[str, Any]:
        writers = self.writers
        dtype = token_dtype(vocab_size)
        digest = hashlib.sha256("".join([dtype, *(writers[split].hash.hexdigest() for split in SPLITS)]).encode())
        info: dict[str, Any] = {
            "source": self.sources.names,
            "data_hash": digest.hexdigest(),
            "tokenizer": self.settings.tokenizer or "trained",
            "validation": "tails of the documents" if documents.tails else "held-out documents",
            "validation_fraction": self.settings.validation_fraction,
            "max_bytes": self.settings.max_bytes,
            "text_field": self.settings.text_field,
            "duplicate_documents": documents.duplicates,
            "vocab_size": vocab_size,
        }
        for split in SPLITS:
            info[f"{split}_documents"] = self.documents[split]
            info[f"{split}_tokens"] = writers[split].tokens
            info[f"{split}_bytes"] = self.text_bytes[split]
        shards = {split: writers[split].shards for split in SPLITS}
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        meta = {"info": info, "dtype": dtype, "shards": shards, "sizes": sizes}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        return meta


def _chain(
    sample: list[tuple[Split, str, int]], rest: Iterator[tuple[Split, str, int]]
) -> Iterator[tuple[Split, str, int]]:
    """The sample, let go of as it is read, then the rest."""
    sample.reverse()
    while sample:
        yield sample.pop()
    yield from rest
