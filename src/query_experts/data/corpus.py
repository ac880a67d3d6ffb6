"""`prepare`: checks the settings, tokenises the text or finds its tokens in the cache, and returns the corpus."""

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

_LAYOUT = 2  # version of the cache folder's layout, part of its name: folders of another layout are never found
_BUILDING = ".building-"  # prefix of a folder that is still being written
_ABANDONED_SECONDS = 24 * 3600
_TOKEN_BYTES_PER_TEXT_BYTE = 0.6  # a token is 2 bytes on disk and stands for about 3 bytes of text


@dataclass(frozen=True)
class TokensInfo:
    """Facts about tokens on disk, as `meta.json` keeps them.

    Attributes:
        source: the entries of `data` as given, or only "python standard library X.Y.Z".
        data_hash: SHA-256 over the tokens, in hex; the same on every machine.
        tokenizer: "trained", or the name of the tokenizer that was given.
        validation: "held-out documents" or "tails of the documents".
        validation_fraction, max_bytes, text_field: the settings that the tokens were made with.
        duplicate_documents: documents dropped because their text occurred before.
        vocab_size: one more than the tokenizer's highest id.
        train_documents, validation_documents: documents in each split; both count a document cut in two.
        train_tokens, validation_tokens: tokens in each split.
        train_bytes, validation_bytes: text in each split, in UTF-8 bytes.
    """

    source: list[str]
    data_hash: str
    tokenizer: str
    validation: str
    validation_fraction: float
    max_bytes: int | None
    text_field: str
    duplicate_documents: int
    vocab_size: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    validation_documents: int
    validation_tokens: int
    validation_bytes: int


@dataclass(frozen=True)
class CorpusInfo(TokensInfo):
    """Facts about a corpus: those about its tokens, and those that `prepare` adds when it opens them.

    Attributes:
        seq_len: tokens in a sequence.
        skipped_files: ending of a file name -> number of such files in the folders that can't be read.
    """

    seq_len: int
    skipped_files: dict[str, int]


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


@dataclass(frozen=True)
class _TokenFolder:
    """The content of `meta.json`, which describes a folder of tokens.

    shards: split -> its files in order. sizes: path of each file in the folder -> its bytes.
    """

    info: TokensInfo
    dtype: str
    shards: dict[Split, list[str]]
    sizes: dict[str, int]


@dataclass(frozen=True)
class _Settings:
    """The settings that the tokens on disk depend on; `seq_len` isn't one of them."""

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
            _check("vocab_size", self.vocab_size, _is_whole(self.vocab_size, SMALLEST_VOCABULARY), allowed)
        fraction = self.validation_fraction
        valid = isinstance(fraction, int | float) and 0 < fraction < 1
        _check("validation_fraction", fraction, valid, "a number above 0 and below 1")
        valid = self.max_bytes is None or _is_whole(self.max_bytes, 1)
        _check("max_bytes", self.max_bytes, valid, "a whole number, at least 1, or None")
        _check("shard_bytes", self.shard_bytes, _is_whole(self.shard_bytes, 4), "a whole number, at least 4")
        valid = isinstance(self.text_field, str) and self.text_field != ""
        _check("text_field", self.text_field, valid, "the name of a field")

    def fingerprint(self) -> list[object]:
        """The settings that change the tokens, and the files of a tokenizer that is a folder."""
        if self.tokenizer is None:
            return [asdict(self)]
        folder = Path(self.tokenizer).expanduser()
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        stats = [(path.name, path.stat()) for path in files]
        return [asdict(self) | {"vocab_size": 0}, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise SettingError(f"{name} is {value!r}; it must be {allowed}")


def _is_whole(value: object, least: int) -> bool:
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

    Order: files come in a fixed shuffled order, by a hash of their relative paths. So the text up to `max_bytes` is a
    sample of a folder. Documents within a file keep their order; hub data sets come last.

    Split: a document is held out if a hash of its text falls in the lowest `validation_fraction`, independent of the
    order. Exact duplicates are kept once. With two documents or more, each split has at least one. The last
    `validation_fraction` of each document, from a line break on, is held out instead in two cases: all sources are
    files of one document each and fewer than 50 of them are read, or there is only one document.

    Cache: the folder's name depends on the settings (not on `seq_len`) and on each file's relative path, size and
    modification time. Any change there builds another folder. A hub data set counts as unchanged while its name is.

    Memory: one batch of documents, or one whole text file, or 10 MB of text while the BPE trains; and a 16-byte hash
    for each document.

    A failed build leaves nothing behind. Tokens that are too few for `seq_len` stay cached for a shorter one.

    Args:
        data: what to read. Files, or folders (recursive, without hidden files), of .txt, .md and .py (a file is one
            document), .jsonl (a line is one) and .parquet (a row is one), each also with .gz, .xz or .zst. Hub data
            sets, as owner/name or owner/name:config, whose train split is streamed. One folder of tokens that an
            earlier call made in its `cache_dir`: its tokens are used as they are, so a machine without the text can
            use them too; of the settings only `seq_len` applies then. None reads the source code of this machine's
            Python standard library.
        cache_dir: folder for the tokens.
        seq_len: tokens in a sequence, 2 or more.
        vocab_size: ids of the BPE that is trained, 257 or more; ignored with a given tokenizer.
        tokenizer: a name or folder for AutoTokenizer; None trains a byte-level BPE on the first 10 MB of the training
            split. Each document ends with the tokenizer's eos token.
        validation_fraction: share of the text that is held out, above 0 and below 1.
        max_bytes: UTF-8 bytes of text to read; the document that reaches the limit is cut there, at a line break.
            None reads all.
        shard_bytes: largest size of a file of tokens, 4 or more.
        text_field: field of a .jsonl line, or column of a .parquet file, that holds the text.
        progress: whether to show progress bars on stderr.

    Returns:
        The corpus: both splits, the tokenizer and the facts about them.

    Raises:
        SettingError: for a setting or source that can't be used, for a split shorter than one sequence, and for a
            `cache_dir` that can't be written to or whose disk is full.
    """
    settings = _Settings(vocab_size, tokenizer, validation_fraction, max_bytes, shard_bytes, text_field)
    _check("seq_len", seq_len, _is_whole(seq_len, 2), "a whole number of tokens, at least 2")
    settings.check()
    if data and len(data) == 1:
        folder = Path(data[0]).expanduser()
        if (tokens := _read_meta(folder)) is not None:
            return _open(folder, tokens, seq_len, {})
    sources = find_sources(data)
    folder = Path(cache_dir) / f"corpus-{_fingerprint(settings, sources)}"
    tokens = _read_meta(folder) or _build_into(folder, settings, sources, progress)
    return _open(folder, tokens, seq_len, sources.skipped)


def _fingerprint(settings: _Settings, sources: Sources) -> str:
    described = json.dumps([_LAYOUT, settings.fingerprint(), sources.fingerprint()])
    return hashlib.sha256(described.encode()).hexdigest()[:20]


def _read_meta(folder: Path) -> _TokenFolder | None:
    """The folder's meta.json; None unless a build wrote it and each file that it lists has its full length."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        return _TokenFolder(TokensInfo(**meta["info"]), meta["dtype"], meta["shards"], meta["sizes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open(folder: Path, tokens: _TokenFolder, seq_len: int, skipped: dict[str, int]) -> Corpus:
    info = CorpusInfo(**asdict(tokens.info), seq_len=seq_len, skipped_files=skipped)
    _check_length("train", info.train_tokens, info.train_documents, seq_len)
    _check_length("validation", info.validation_tokens, info.validation_documents, seq_len)
    train, validation = (
        TokenSequences([folder / name for name in tokens.shards[split]], tokens.dtype, seq_len) for split in SPLITS
    )
    load = PreTrainedTokenizerFast if info.tokenizer == "trained" else AutoTokenizer
    return Corpus(train, validation, load.from_pretrained(folder / "tokenizer"), info)


def _check_length(split: Split, tokens: int, documents: int, seq_len: int) -> None:
    """Raises SettingError for a split that is shorter than one sequence."""
    if tokens < seq_len:
        raise SettingError(
            f"seq_len is {seq_len}, but the {split} split of data has only {tokens} tokens "
            f"({documents} document{'s' * (documents != 1)}); it must be at most that, or give more text"
        )


def _build_into(folder: Path, settings: _Settings, sources: Sources, progress: bool) -> _TokenFolder:
    """Build next to `folder` and rename at the end; of two builds at once the first to finish is kept."""
    cache_dir = folder.parent
    building = cache_dir / f"{_BUILDING}{folder.name}-{uuid.uuid4().hex[:8]}"
    build = _Build(building, settings, sources, progress)
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
    if folder.exists() and _read_meta(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if _read_meta(folder) is None:
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


class _Build:
    """Writes one folder of tokens: tokenizer/, the shards of both splits, then meta.json."""

    def __init__(self, folder: Path, settings: _Settings, sources: Sources, progress: bool) -> None:
        self.folder, self.settings, self.sources = folder, settings, sources
        self.progress = progress
        self.writers: dict[Split, ShardWriter] = {}
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        total, limit = sources.text_bytes(), settings.max_bytes
        self.expected_bytes = limit if total is None else min(total, limit or total)

    def run(self) -> _TokenFolder:
        """Write everything and return what meta.json holds. Raises SettingError, and OSError for a disk error."""
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
            for split, ids, text_bytes, ends_document in tokenize_documents(documents, tokenizer):
                self.writers[split].append(ids)
                self.documents[split] += ends_document
                self.text_bytes[split] += text_bytes
                bar.set_postfix(documents=sum(self.documents.values()), refresh=False)
                bar.update(text_bytes)

    def _write_meta(self, documents: SplitDocuments, vocab_size: int) -> _TokenFolder:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        tokens = _TokenFolder(
            info=self._info(documents, vocab_size),
            dtype=token_dtype(vocab_size),
            shards={split: self.writers[split].shards for split in SPLITS},
            sizes={path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files},
        )
        meta = json.dumps(asdict(tokens), indent=1)
        (self.folder / "meta.json").write_text(meta + "\n", encoding="utf-8")
        return tokens

    def _info(self, documents: SplitDocuments, vocab_size: int) -> TokensInfo:
        hashes = "".join([token_dtype(vocab_size), *(self.writers[split].hash.hexdigest() for split in SPLITS)])
        return TokensInfo(
            source=self.sources.names,
            data_hash=hashlib.sha256(hashes.encode()).hexdigest(),
            tokenizer=self.settings.tokenizer or "trained",
            validation="tails of the documents" if documents.tails else "held-out documents",
            validation_fraction=self.settings.validation_fraction,
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
        )


def _chain(
    sample: list[tuple[Split, str, int]], rest: Iterator[tuple[Split, str, int]]
) -> Iterator[tuple[Split, str, int]]:
    """The sample, freed from memory document by document, then the rest."""
    sample.reverse()
    while sample:
        yield sample.pop()
    yield from rest
