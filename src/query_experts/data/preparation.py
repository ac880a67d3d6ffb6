"""`data prepare`: tokenises text once into a folder, in pieces of which no finished one is lost.

The folder is what `prepare` makes of the same source and settings, token for token. While it is unfinished it holds two
more files: `.preparing.json`, the state after the last piece that is known to be on the disk, and `.digests`, those of
the texts up to there. To go on, the shards are cut to that state, and reading begins at its place.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from query_experts.common.errors import SettingError
from query_experts.common.files import read_json, save_tokenizer, sync_file, write_json
from query_experts.common.formatting import short, storage
from query_experts.data.corpus import Build
from query_experts.data.digests import DIGEST_BYTES
from query_experts.data.documents import SPLITS, Split, SplitDocuments
from query_experts.data.estimate import estimate
from query_experts.data.facts import ValidationFile
from query_experts.data.folder import UNFINISHED, TokenFolder, write_folder
from query_experts.data.reading import Reading
from query_experts.data.shards import ShardWriter, token_dtype
from query_experts.data.sources import Sources, find_sources
from query_experts.data.token_folder import (
    DIGESTS,
    REMOVE,
    TOKENIZER,
    begin,
    cannot_write,
    clear,
    finished_folder,
    is_begun,
    own_folder,
    remove_state,
)
from query_experts.data.token_settings import TokenSettings
from query_experts.data.tokenizing import load_fast_tokenizer, vocabulary_size
from query_experts.data.validation_files import ValidationReader, find_validation_files, shares_documents
from query_experts.data.workers import Encoded, Encoding, Piece, encode_pieces

PIECE_CHARACTERS = 1 << 21
PIECE_DOCUMENTS = 2048
COMMIT_BYTES = 1 << 25  # of text; at most so much is tokenised again after a kill
CLEARLY_BEYOND = 2  # times the free disk: an estimate knows no duplicates


@dataclass(frozen=True)
class Prepared:
    """A finished folder. seconds: how long this call took; None where the folder was finished before."""

    tokens: TokenFolder
    seconds: float | None


def prepare_folder(
    data: Sequence[str],
    out: Path,
    settings: TokenSettings,
    *,
    validation: Sequence[str] = (),
    workers: int = 1,
    progress: bool = True,
    say: Callable[[str], Any] = lambda sentence: None,
) -> Prepared:
    """Tokenise text into the folder `out`, or go on with it.

    Memory: a text is held whole, and a text file is one. With several workers, those that are read ahead have eight
    million characters for each worker, and one text beyond that; each worker holds the text and the tokens of one
    piece: two million characters, and one text beyond that. A document takes 24 to 48 bytes more, by which exact
    duplicates are found: 1.1 GB for 40 million documents, and 1.6 GB for moments.

    Args:
        data: files, folders and hub data sets, as `prepare` takes them. A hub data set is read at the commit that it
            has at the first call.
        out: the folder of tokens, which `prepare` opens.
        settings: what the tokens depend on.
        validation: files, and folders of files, that are held out whole, as `prepare` takes them.
        workers: processes that tokenise; 1 for this process.
        progress: whether to show progress bars on stderr.
        say: called with the disk that the tokens will take, before they are written.

    Raises:
        SettingError: for a setting or source that can't be used, for an `out` that holds other files or tokens that
            were begun with another source or other settings, for a disk without room, and for a worker that died.
    """
    settings.check()
    sources = find_sources(data)
    held_out = find_validation_files(validation) if validation else None
    start = time.monotonic()
    with own_folder(out):
        revisions = begin(out, settings, sources, held_out)
        if (tokens := finished_folder(out)) is not None:
            return Prepared(tokens, None)
        build = Preparation(out, settings, sources, held_out, revisions, workers, progress, say)
        try:
            with _disk_errors(out, build):
                tokens = build.run()
        finally:
            if not is_begun(out):
                clear(out)
        remove_state(out)
        return Prepared(tokens, time.monotonic() - start)


@contextmanager
def _disk_errors(out: Path, build: "Preparation") -> Iterator[None]:
    """Raises SettingError for a disk error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise cannot_write(out, error) from error
        raise SettingError(
            f"out is {out}, whose disk is full: {build.space_needed()}; free that much, and the same command goes on"
        ) from error


class Preparation(Build):
    """Writes a folder of tokens piece by piece, or goes on with it."""

    def __init__(
        self,
        folder: Path,
        settings: TokenSettings,
        sources: Sources,
        held_out: Sources | None,
        revisions: list[str | None],
        workers: int,
        progress: bool,
        say: Callable[[str], Any],
    ) -> None:
        super().__init__(folder, settings, sources, held_out, progress)
        self.revisions, self.workers, self.say = revisions, workers, say
        self.state: dict[str, Any] = {}  # after the last whole piece
        self.digests = bytearray()  # of the texts up to there, without those on the disk
        self.digests_on_disk = 0
        self.committed_bytes = 0  # of text

    def run(self) -> TokenFolder:
        """Write everything that isn't there yet. Returns what meta.json holds. Raises SettingError and OSError."""
        tokenizer = self._tokenizer()
        self.state = read_json(self.folder / UNFINISHED, REMOVE)
        self._require_space(tokenizer)
        mark = self.state.get("mark")
        reading = self._reading(mark["place"] if mark else None)
        documents = self._documents(reading)
        self._go_on(documents, token_dtype(vocabulary_size(tokenizer)))
        files: list[ValidationFile] = []
        kept: dict[bytes, Path] = {}
        duplicates = 0
        if self.held_out is not None:
            reader = ValidationReader(tokenizer, (), self.settings.text_field, self.folder)
            files, kept, duplicates = self._write_files(self.held_out, reader), reader.kept, reader.duplicates
        if not (mark and mark["finished"]):
            self._stream(tokenizer, documents, reading, kept)
        if not documents.documents:
            raise SettingError(f"data holds {self.sources.names!r}, in which there is no text; it must hold some")
        documents.duplicates += duplicates
        self._sync()
        return write_folder(self.folder, self._info(documents, files, vocabulary_size(tokenizer)), self.writers)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """The folder's own tokenizer: the one that was given, or one trained on the start of the text."""
        saved, unfinished = self.folder / TOKENIZER, self.folder / f".{TOKENIZER}"
        name = self.settings.tokenizer
        if not saved.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            sample = [] if name else self._sample(iter(self._documents(self._reading(None))))
            save_tokenizer(load_fast_tokenizer(name) if name else self._train(sample), unfinished)
            for path in unfinished.iterdir():
                sync_file(path)
            unfinished.rename(saved)
        loaded = load_fast_tokenizer(str(saved)) if name else PreTrainedTokenizerFast.from_pretrained(saved)
        backend = Tokenizer.from_file(str(saved / "tokenizer.json"))  # as it was, whatever the loaded class makes of it
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=loaded.eos_token)

    def _documents(self, reading: Reading) -> SplitDocuments:
        tails = self.held_out is None and self.sources.few_documents(self.settings.max_bytes)
        return SplitDocuments(reading, self._fraction(), self.settings.max_bytes, tails)

    def _reading(self, place: dict[str, Any] | None) -> Reading:
        return Reading(self.sources, self.revisions, self.settings.text_field, self.folder, place)

    def _require_space(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Says how much disk the tokens take and how much is free, and whether that may be too little.

        Raises SettingError where the estimate is more than `CLEARLY_BEYOND` times what is free.
        """
        settings = self.settings
        expected = estimate(self.sources, self.revisions, settings.text_field, settings.max_bytes, tokenizer)
        width = np.dtype(token_dtype(vocabulary_size(tokenizer))).itemsize
        free = shutil.disk_usage(self.folder).free
        if expected.text_bytes is None:
            rate = storage(1e9 * width * expected.tokens)
            self.say(
                "The disk that the tokens will take isn't known, as the source doesn't tell its size: about "
                f"{rate} for each GB of text, by an estimate; {storage(free)} are free"
            )
            return
        self.expected_bytes = round(expected.text_bytes)
        size, working = width * expected.tokens, DIGEST_BYTES * expected.documents
        written = sum(width * split["tokens"] for split in self.state.get("splits", {}).values())
        needed = max(size + working - written, 0)
        self.say(
            f"The tokens will take about {storage(size)} of disk (an estimate: {short(expected.tokens)} tokens, by "
            f"{storage(expected.sampled_bytes)} of the text), and {storage(working)} more until they are finished; "
            + f"{storage(written)} are written, " * bool(written)
            + f"{storage(free)} are free"
        )
        if needed > CLEARLY_BEYOND * free:
            raise SettingError(
                f"out is {self.folder}, whose disk has {storage(free)} free; it needs about {storage(needed)}, by an "
                "estimate: free that much, lower max_bytes or name a folder on another disk"
            )
        if needed > free:
            self.say(
                f"Warning: {storage(needed)} are needed by that estimate, and {storage(free)} are free. Duplicates, "
                "which it counts too, may make it less. A disk that fills up ends the command; what is finished is kept"
            )

    def _go_on(self, documents: SplitDocuments, dtype: str) -> None:
        """Brings the writers and the documents to the state on the disk."""
        splits = self.state.get("splits", {})
        if self.held_out is not None:  # it is short, and written anew
            splits = {split: held for split, held in splits.items() if split == "train"}
        self.writers = {split: ShardWriter(self.folder, split, dtype, self.settings.shard_bytes) for split in SPLITS}
        written = sum(np.dtype(dtype).itemsize * held["tokens"] for held in splits.values())
        hidden = not (self.progress and written)
        with tqdm(desc="checking what is written", total=written, unit="B", unit_scale=True, disable=hidden) as bar:
            for split, writer in self.writers.items():
                held = splits.get(split, {"tokens": 0, "documents": 0, "text_bytes": 0})
                self.documents[split], self.text_bytes[split] = held["documents"], held["text_bytes"]
                self._go_on_with(writer, held["tokens"], held.get("sha256", writer.hash.hexdigest()), bar.update)
        self.committed_bytes = sum(self.text_bytes.values())
        mark = self.state.get("mark")
        self._read_digests(documents, mark["documents"]["digests"] if mark else 0)
        if mark:
            documents.restore(mark["documents"])

    def _go_on_with(self, writer: ShardWriter, tokens: int, checksum: str, seen: Callable[[int], Any]) -> None:
        try:
            writer.go_on(tokens, seen)
        except ValueError as error:
            raise SettingError(f"out is {self.folder}, whose {error} is missing or was cut; {REMOVE}") from error
        if writer.hash.hexdigest() != checksum:
            names = f"{writer.shards[0]} to {writer.shards[-1]}"
            raise SettingError(f"out is {self.folder}, where one of {names} holds other tokens than written; {REMOVE}")

    def _read_digests(self, documents: SplitDocuments, count: int) -> None:
        path = self.folder / DIGESTS
        path.touch()
        os.truncate(path, min(DIGEST_BYTES * count, path.stat().st_size))
        with path.open("rb") as file:
            while digest := file.read(DIGEST_BYTES):
                documents.digests.add(digest)
        if len(documents.digests) != count:
            raise SettingError(f"out is {self.folder}, whose {DIGESTS} was cut or changed; {REMOVE}")
        self.digests_on_disk = count

    def _stream(
        self,
        tokenizer: PreTrainedTokenizerFast,
        documents: SplitDocuments,
        reading: Reading,
        held_out: dict[bytes, Path],
    ) -> None:
        """Tokenise the text from the place of the reading on."""
        dtype = token_dtype(vocabulary_size(tokenizer))
        encoding = Encoding(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, dtype)
        pieces = _pieces(documents, reading, held_out)
        start, before = time.monotonic(), self._tokens()
        with (
            self._bar("tokenising text", self.expected_bytes) as bar,
            closing(encode_pieces(pieces, encoding, self.workers)) as encoded,
        ):
            bar.update(self.committed_bytes)
            bar.initial = self.committed_bytes
            try:
                for piece, tokens in encoded:
                    self._add(piece, tokens)
                    speed = (self._tokens() - before) / (time.monotonic() - start)
                    bar.set_postfix_str(f"{short(speed)} tokens/s", refresh=False)
                    bar.update(sum(split.text_bytes for split in tokens.values()))
                    if sum(self.text_bytes.values()) - self.committed_bytes >= COMMIT_BYTES:
                        self._commit()
            except BaseException:
                with suppress(OSError):
                    self._commit()
                raise
            self._commit()

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def _add(self, piece: Piece, tokens: dict[Split, Encoded]) -> None:
        """Append a piece. The state is the one before until all of it is there."""
        for split, encoded in tokens.items():
            writer = self.writers[split]
            writer.append(np.frombuffer(encoded.ids, dtype=writer.dtype))
            self.documents[split] += encoded.documents
            self.text_bytes[split] += encoded.text_bytes
        self.digests += piece.digests
        splits = {
            split: {
                "tokens": writer.tokens, "documents": self.documents[split], "text_bytes": self.text_bytes[split],
                "sha256": writer.hash.hexdigest(),
            }
            for split, writer in self.writers.items()
        }  # fmt: skip
        self.state = {"mark": piece.mark, "splits": splits}

    def _sync(self) -> None:
        for writer in self.writers.values():
            writer.sync()

    def _commit(self) -> None:
        """Brings the state to the disk, after all that it counts."""
        self._sync()
        with (self.folder / DIGESTS).open("r+b") as file:
            file.truncate(DIGEST_BYTES * self.digests_on_disk)  # a full disk may have taken a part of them
            file.seek(0, os.SEEK_END)
            file.write(self.digests)
        sync_file(self.folder / DIGESTS)
        self.digests_on_disk += len(self.digests) // DIGEST_BYTES
        self.digests.clear()
        write_json(self.folder / UNFINISHED, self.state)
        self.committed_bytes = sum(self.text_bytes.values())


def _pieces(documents: SplitDocuments, reading: Reading, held_out: dict[bytes, Path]) -> Iterator[Piece]:
    """The documents in pieces, each with the state after it.

    Raises SettingError for a document that is in a validation file too.
    """
    documents.log = bytearray()
    batch: list[tuple[Split, str, int]] = []
    characters = 0

    def piece(finished: bool) -> Piece:
        digests = bytes(documents.log or b"")
        for start in range(0, len(digests), DIGEST_BYTES) if held_out else ():
            if (path := held_out.get(digests[start : start + DIGEST_BYTES])) is not None:
                raise shares_documents(path, 1)
        documents.log = bytearray()
        return Piece(batch, {"place": reading.place(), "documents": documents.state(), "finished": finished}, digests)

    for group in documents.by_text():
        batch += group
        characters += sum(len(text) for _, text, _ in group)
        if not documents.finished and (characters >= PIECE_CHARACTERS or len(batch) >= PIECE_DOCUMENTS):
            yield piece(finished=False)
            batch, characters = [], 0
    yield piece(finished=True)
