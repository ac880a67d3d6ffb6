"""Estimates how many tokens a source will give, from a sample of its text and the sizes of its files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from query_experts.data import readers
from query_experts.data.documents import Split
from query_experts.data.readers import Head
from query_experts.data.sources import SourceFile, Sources
from query_experts.data.tokenizing import tokenize_documents

SAMPLE_BYTES = 4_000_000  # of text, of each kind of file and of each data set
_FILES = 32  # of a kind that are sampled


@dataclass(frozen=True)
class Estimate:
    """What a source gives, roughly; duplicates aren't taken off.

    text_bytes: UTF-8 bytes of its text; None where the source doesn't tell its size. tokens, documents: of that text;
    of one byte where the size isn't known. sampled_bytes: of text that was tokenised for it.
    """

    text_bytes: float | None
    tokens: float
    documents: float
    sampled_bytes: int


def estimate(
    sources: Sources,
    revisions: Sequence[str | None],
    text_field: str,
    max_bytes: int | None,
    tokenizer: PreTrainedTokenizerFast,
) -> Estimate:
    """Reads and tokenises a sample of each kind of file and of each data set. Raises SettingError as reading does."""
    found = [(head.times, _sample(head, tokenizer)) for head in _heads(sources, revisions, text_field)]
    sampled = sum(sample.sampled_bytes for _, sample in found)
    whole = Estimate(
        text_bytes=sum(times * sample.sampled_bytes for times, sample in found),
        tokens=sum(times * sample.tokens for times, sample in found),
        documents=sum(times * sample.documents for times, sample in found),
        sampled_bytes=sampled,
    )
    if math.isnan(whole.tokens):  # of one byte, or of all that may be read
        part = (max_bytes or 1) / max(sampled, 1)
        tokens, documents = sum(sample.tokens for _, sample in found), sum(sample.documents for _, sample in found)
        return Estimate(max_bytes, part * tokens, part * documents, sampled)
    part = 1.0 if max_bytes is None else min(1.0, max_bytes / max(whole.text_bytes or 0.0, 1.0))
    return Estimate(part * (whole.text_bytes or 0.0), part * whole.tokens, part * whole.documents, sampled)


def _sample(head: Head, tokenizer: PreTrainedTokenizerFast) -> Estimate:
    documents: list[tuple[Split, str, int]] = [("train", text, 0) for text in head.texts if text.strip()]
    text_bytes = sum(len(text.encode()) for _, text, _ in documents)
    tokens = sum(len(piece.ids) for piece in tokenize_documents(documents, tokenizer))
    return Estimate(None, tokens, len(documents), text_bytes)


def _heads(sources: Sources, revisions: Sequence[str | None], text_field: str) -> Iterator[Head]:
    kinds: dict[tuple[str | None, str], list[SourceFile]] = {}
    for file in sources.files:
        kinds.setdefault((readers.format_of(file.path), file.path.suffix.lower()), []).append(file)
    for files in kinds.values():
        yield from _of_files(files, text_field)
    for (name, config), revision in zip(sources.hub, revisions, strict=True):
        yield readers.hub_head(name, config, text_field, revision, SAMPLE_BYTES)


def _of_files(files: list[SourceFile], text_field: str) -> Iterator[Head]:
    """The first texts of files that are spread evenly over all of them; each stands for its share of all bytes."""
    count = min(len(files), _FILES)
    chosen = [files[number * len(files) // count] for number in range(count)]
    share = sum(file.size for file in files) / max(sum(file.size for file in chosen), 1)
    for file in chosen:
        head = readers.read_head(file.path, text_field, SAMPLE_BYTES // count)
        yield Head([], math.nan) if head is None else head._replace(times=share * head.times)
