"""Facts about tokens on disk and about the corpus that they make."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ValidationFile:
    """Facts about the text that a validation file contributes.

    Attributes:
        name: the file's name without the endings of its format and compression.
        documents: its documents; one that is cut counts.
        tokens: their tokens, with an end-of-text token for each document.
        bytes: their text, in UTF-8 bytes.
    """

    name: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class ValidationPart:
    """The sequences of one validation file within the validation split.

    Attributes:
        name: the file's name without the endings of its format and compression.
        first_sequence: position of its first sequence in the split.
        sequences: number of its sequences, which follow one another.
        tokens: its tokens, with an end-of-text token for each document and those left over after the last sequence.
        text_bytes: the text of these tokens, in UTF-8 bytes.
    """

    name: str
    first_sequence: int
    sequences: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokensInfo:
    """Facts about tokens on disk, as `meta.json` keeps them.

    Attributes:
        source: the entries of `data` as given, or only "python standard library X.Y.Z".
        data_hash: SHA-256 over the tokens, and over the names and lengths of validation files, in hex; the same on
            every machine.
        tokenizer: "trained", or the name of the tokenizer that was given.
        validation: "held-out documents", "tails of the documents" or "validation files".
        validation_fraction, max_bytes, text_field: the settings that the tokens were made with; the fraction is None
            with validation files.
        duplicate_documents: documents dropped because their text occurred before.
        vocab_size: one more than the tokenizer's highest id.
        train_documents, validation_documents: documents in each split; both count a document cut in two.
        train_tokens, validation_tokens: tokens in each split.
        train_bytes, validation_bytes: text in each split, in UTF-8 bytes.
        validation_files: what each validation file contributes to the validation split, in its order.
    """

    source: list[str]
    data_hash: str
    tokenizer: str
    validation: str
    validation_fraction: float | None
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
    validation_files: list[ValidationFile] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CorpusInfo(TokensInfo):
    """Facts about a corpus: those about its tokens, and those that `prepare` adds when it opens them.

    Attributes:
        seq_len: tokens in a sequence.
        skipped_files: ending of a file name -> number of such files in the folders that can't be read. Links to a
            folder that they are in count too, as "link to a folder around it".
    """

    seq_len: int
    skipped_files: dict[str, int]
