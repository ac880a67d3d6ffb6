"""Validation files: text that is held out whole, each file as a part of the validation split."""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from query_experts.common.errors import SettingError
from query_experts.common.formatting import plural
from query_experts.data.documents import Split, digest_of, head
from query_experts.data.readers import name_without_endings, read_file
from query_experts.data.sources import OR_HUB, SourceFile, Sources, find_sources, missing
from query_experts.data.tokenizing import Tokens, tokenize_documents

FILE_TOKENS = 400_000  # of one file at most; part of the cache folder's name


def find_validation_files(validation: Sequence[str]) -> Sources:
    """The files that the `validation` setting names, ordered by the names of their parts.

    Raises SettingError for an entry that can't be read, and for two files of one name.
    """
    with _errors_about_validation():
        sources = find_sources(validation)
        for name, config in sources.hub:
            raise missing(name if config is None else f"{name}:{config}")
    by_name: dict[str, SourceFile] = {}
    for file in sources.files:
        if (other := by_name.setdefault(name_without_endings(file.path), file)) is not file:
            raise SettingError(
                f"validation holds {str(other.path)!r} and {str(file.path)!r}, whose names without endings are the "
                "same; each file must have a name of its own"
            )
    return Sources(sources.names, [by_name[name] for name in sorted(by_name)], skipped=sources.skipped)


def validation_fingerprint(held_out: Sources) -> list[object]:
    """Changes when a file, or the limit of each, changes."""
    return [held_out.fingerprint(), FILE_TOKENS]


@contextmanager
def _errors_about_validation() -> Iterator[None]:
    """Errors about the text name the setting `data`, which takes hub data sets too; this names `validation`."""
    try:
        yield
    except SettingError as error:
        raise SettingError(str(error).replace("data ", "validation ", 1).replace(OR_HUB, "")) from error


class ValidationReader:
    """Reads and tokenises validation files, one after another.

    Exact duplicates are kept once, over all files. `duplicates` counts those that were dropped, and `kept` holds the
    digests of the others, with their files.

    Args:
        tokenizer: the tokenizer of the training split.
        trained_on: digests of all training documents.
        text_field: field of a .jsonl line, or column of a .parquet file, that holds the text.
        scratch: folder for a decompressed parquet file.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, trained_on: Container[bytes], text_field: str, scratch: Path
    ) -> None:
        self.duplicates = 0
        self._tokenizer, self._trained_on = tokenizer, trained_on
        self._text_field, self._scratch = text_field, scratch
        self.kept: dict[bytes, Path] = {}

    def documents(self, file: SourceFile) -> Iterator[list[Tokens]]:
        """The tokens of each document, up to `FILE_TOKENS` tokens.

        Raises SettingError, at the end, for a file without text of its own and for documents that are trained on.
        """
        digests: list[bytes] = []
        count = 0
        for document in documents_within(FILE_TOKENS, self._texts(file, digests), self._tokenizer):
            count += 1
            yield document
        kept = {*digests[:count]}  # more texts may have been read than fit
        if not kept:
            raise SettingError(
                f"validation holds {str(file.path)!r}, in which there is no text, or only text of other validation "
                "files; each file must hold some"
            )
        if shared := [digest for digest in kept if digest in self._trained_on]:
            raise shares_documents(file.path, len(shared))
        self.kept |= dict.fromkeys(kept, file.path)

    def _texts(self, file: SourceFile, digests: list[bytes]) -> Iterator[str]:
        """The texts without blank ones and duplicates, whose digests are appended."""
        own: set[bytes] = set()
        with _errors_about_validation():
            for text in read_file(file.path, self._text_field, self._scratch):
                if not text.strip():
                    continue
                digest = digest_of(text.encode())
                if digest in self.kept or digest in own:
                    self.duplicates += 1
                    continue
                own.add(digest)
                digests.append(digest)
                yield text


def shares_documents(path: Path, count: int) -> SettingError:
    """The error for a validation file with documents that are trained on."""
    return SettingError(
        f"validation holds {str(path)!r}, which shares {plural(count, 'document')} with data; "
        "a document must be on one side only"
    )


def documents_within(limit: int, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Tokens]]:
    """The tokens of the first texts, in pieces, at most `limit` tokens in all.

    Texts stay whole: the one that would pass the limit, and all after it, are left out. Only a first text that is
    longer than the limit is cut, at a line break if it has one.
    """
    room, pieces = limit, list[Tokens]()
    waiting: deque[str] = deque()

    def remembered() -> Iterator[tuple[Split, str, int]]:
        for text in texts:
            waiting.append(text)
            yield "validation", text, 0

    for piece in tokenize_documents(remembered(), tokenizer):
        pieces.append(piece)
        if _count(pieces) > room:
            if room == limit:
                yield _cut(waiting[0], pieces, limit, tokenizer)
            return
        if piece.ends_document:
            yield pieces
            room, pieces = room - _count(pieces), []
            waiting.popleft()


def _count(pieces: Iterable[Tokens]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _cut(text: str, pieces: list[Tokens], limit: int, tokenizer: PreTrainedTokenizerFast) -> list[Tokens]:
    """The tokens of the longest head of a text, roughly, that has at most `limit`. pieces: those of a longer head."""
    encoded = text.encode()[: sum(piece.text_bytes for piece in pieces)]
    while (count := _count(pieces)) > limit:
        encoded = head(encoded, len(encoded) * limit // count)
        pieces = [*tokenize_documents([("validation", encoded.decode(), 0)], tokenizer)]
    return pieces
