"""Tokenizers: trains a byte-level BPE, loads a given tokenizer, and turns documents into token ids in batches."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from query_experts.common.checkpoints import has_tokenizer, missing_on_hub
from query_experts.common.errors import SettingError
from query_experts.data.documents import Split
from query_experts.data.windows import JoinedWindows, Window, windows_of

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token
TRAINING_BYTES = 10_000_000
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 21
_BATCH_WINDOWS = 1024
_OFF = "False"  # unlike a user's "false", so that this module recognises its own value


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` ids; fewer if too few pairs occur twice in the text.

    Any text survives encoding and decoding unchanged. `<|endoftext|>`, id 0, is the bos, eos and pad token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # it prints to stdout
    )
    with _parallel_tokenizers():
        tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_fast_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer `name`, from a folder or the hub. Raises SettingError if it can't be used or has no eos token."""
    folder = Path(name).expanduser()
    allowed = (
        "a folder that holds a tokenizer, the name of one on the Hugging Face hub, or none to train one on the data"
    )
    if not name:
        raise SettingError(f"tokenizer is {name!r}; it must be {allowed}")
    if not folder.exists() and (why := missing_on_hub(name)) is not None:
        raise SettingError(f"tokenizer is {name!r}, which is no folder here, and {why}; it must be {allowed}")
    if folder.is_dir() and not has_tokenizer(str(folder)):
        raise SettingError(f"tokenizer is {name!r}, a folder that holds none; it must be {allowed}")
    try:
        if (folder / "tokenizer.json").is_file():
            json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise SettingError(f"tokenizer is {name!r}, which can't be loaded ({reason}); it must be {allowed}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise SettingError(f"tokenizer is {name!r}, which has no fast form; it must be a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise SettingError(f"tokenizer is {name!r}, which has no eos_token; it needs one to end a document with")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id: the rows that an embedding needs, since ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


class Tokens(NamedTuple):
    """The token ids of a document, or of a piece of one, and the UTF-8 bytes of its text."""

    split: Split
    ids: list[int]
    text_bytes: int
    ends_document: bool


def tokenize_documents(
    documents: Iterable[tuple[Split, str, int]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Tokens]:
    """The documents' tokens, in order, as `DocumentTokenizer` gives them."""
    return DocumentTokenizer(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id).tokens(documents)


class DocumentTokenizer:
    """Tokenises documents; each ends with the eos token.

    Text that spells a special token is tokenised as text. A document of more than a million characters comes in pieces,
    which bounds memory. Their tokens are those of the whole document, but at a cut in four million characters without
    words.

    Args:
        serialized: a tokenizer of the tokenizers package, as JSON.
        end: id of the eos token.
    """

    def __init__(self, serialized: str, end: int) -> None:
        self._backend = Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._end = end

    def tokens(self, documents: Iterable[tuple[Split, str, int]]) -> Iterator[Tokens]:
        """The documents' tokens, in order."""
        backend, end = self._backend, self._end
        joined = JoinedWindows(backend)
        with _parallel_tokenizers():
            for batch in _batches(documents):
                whole, parts = (
                    iter(encode([w.text for _, w in batch if w.is_whole == of], add_special_tokens=False))
                    for encode, of in ((backend.encode_batch_fast, True), (backend.encode_batch, False))
                )  # only parts need offsets, which the fast one doesn't give
                for split, window in batch:
                    encoding = next(whole if window.is_whole else parts)
                    if window.is_whole:
                        yield Tokens(split, [*encoding.ids, end], len(window.text.encode()), True)
                        continue
                    pieces = [*joined.add(window, encoding)]
                    for number, (ids, text) in enumerate(pieces, 1):
                        ends = window.last and number == len(pieces)
                        yield Tokens(split, [*ids, end] if ends else ids, len(text.encode()), ends)
                    if window.last:
                        joined = JoinedWindows(backend)


def _batches(documents: Iterable[tuple[Split, str, int]]) -> Iterator[list[tuple[Split, Window]]]:
    """The windows of documents in batches of bounded size."""
    batch: list[tuple[Split, Window]] = []
    characters = 0
    for split, text, _ in documents:
        for window in windows_of(text):
            batch.append((split, window))
            characters += len(window.text)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_WINDOWS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, cut after a line break where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Parallel tokenizing inside, off afterwards: else every later fork warns on stderr. A user's own setting stays."""
    name = "TOKENIZERS_PARALLELISM"
    unset = os.environ.get(name) in (None, _OFF)
    if unset:
        os.environ[name] = "true"
    try:
        yield
    finally:
        if unset:
            os.environ[name] = _OFF
