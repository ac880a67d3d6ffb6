"""Estimates how many tokens a source will give, from a sample of its text and the sizes of its files."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from query_experts.data import readers
from query_experts.data.sources import SourceFile, Sources
from query_experts.data.tokenizing import tokenize_documents

SAMPLE_BYTES = 4_000_000  # of text, of each kind of file and of each data set
_FILES = 32  # of a kind that are sampled


@dataclass(frozen=True)
class Estimate:
    """What a source gives, roughly; duplicates aren't taken off.

    text_bytes: UTF-8 bytes of its text; None where the source doesn't tell its size. tokens: of that text, and of each
    byte where the size isn't known. documents: likewise. sampled_bytes: of text that was tokenised for it.
    """

    text_bytes: float | None
    tokens: float
    documents: float
    sampled_bytes: int

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / (self.text_bytes or 1.0)


@dataclass(frozen=True)
class _Sample:
    """Texts, and how many times as much the source holds; None where it doesn't tell."""

    texts: list[str]
    times: float | None


def estimate(
    sources: Sources,
    revisions: Sequence[str | None],
    text_field: str,
    max_bytes: int | None,
    tokenizer: PreTrainedTokenizerFast,
) -> Estimate:
    """Reads and tokenises a sample of each kind of file and of each data set. Raises SettingError as reading does."""
    size = tokens = documents = 0.0
    sampled = sampled_tokens = sampled_documents = 0
    known = True
    for sample in _samples(sources, revisions, text_field):
        text_bytes = sum(len(text.encode()) for text in sample.texts)
        count = sum(len(piece.ids) for piece in tokenize_documents(_as_documents(sample.texts), tokenizer))
        sampled += text_bytes
        sampled_tokens += count
        sampled_documents += len(sample.texts)
        known &= sample.times is not None
        size += text_bytes * (sample.times or 0.0)
        tokens += count * (sample.times or 0.0)
        documents += len(sample.texts) * (sample.times or 0.0)
    if known:
        part = 1.0 if max_bytes is None else min(1.0, max_bytes / max(size, 1.0))
        return Estimate(part * size, part * tokens, part * documents, sampled)
    part = (max_bytes or 1) / max(sampled, 1)
    return Estimate(max_bytes, part * sampled_tokens, part * sampled_documents, sampled)


def _as_documents(texts: Iterable[str]) -> Iterator[tuple]:
    return (("train", text, 0) for text in texts if text.strip())


def _samples(sources: Sources, revisions: Sequence[str | None], text_field: str) -> Iterator[_Sample]:
    kinds: dict[tuple[str | None, str], list[SourceFile]] = {}
    for file in sources.files:
        kinds.setdefault((readers.format_of(file.path), file.path.suffix.lower()), []).append(file)
    for files in kinds.values():
        yield _of_files(files, text_field)
    for (name, config), revision in zip(sources.hub, revisions, strict=True):
        texts = _up_to(SAMPLE_BYTES, readers.read_hub(name, config, text_field, revision))
        rows = readers.hub_rows(name, config, revision)
        yield _Sample(texts, None if rows is None else rows / max(len(texts), 1))


def _of_files(files: list[SourceFile], text_field: str) -> _Sample:
    """The first texts of files that are spread evenly over all of them."""
    count = min(len(files), _FILES)
    chosen = [files[number * len(files) // count] for number in range(count)]
    texts: list[str] = []
    stored = 0.0
    for file in chosen:
        head, head_bytes = readers.read_head(file.path, text_field, SAMPLE_BYTES // count)
        texts += head
        stored += head_bytes
    return _Sample(texts, sum(file.size for file in files) / stored if stored else None)


def _up_to(size: int, texts: Iterator[str]) -> list[str]:
    """The first texts, until they have `size` UTF-8 bytes."""
    found: list[str] = []
    for text in texts:
        found.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    return found
