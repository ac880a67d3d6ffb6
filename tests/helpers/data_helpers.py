"""What the tests of the data share: texts, files of them, corpora, and their documents and tokens."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from query_experts.common.errors import SettingError
from query_experts.data import Corpus, TokenSequences, prepare

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
WORDS = ["naïve", "café", "東京", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "Привет", "🙂", "and"]


def texts_of(count: int, lines: int = 12) -> list[str]:
    """Different documents with non-ASCII characters, of a few lines each."""
    return [
        "\n".join(f"{WORDS[(i + j) % len(WORDS)]} {WORDS[(i * j + 3) % len(WORDS)]} {i}.{j}" for j in range(lines))
        + "\n"
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def build(tmp_path: Path, data: list[str] | None, **settings) -> Corpus:
    defaults = {"cache_dir": tmp_path / "cache", "seq_len": 8, "vocab_size": 300, "progress": False}
    return prepare(data, **{**defaults, **settings})


def stored(sequences: TokenSequences) -> np.ndarray:
    return np.concatenate([np.fromfile(shard, dtype=sequences.dtype) for shard in sequences.shards]).astype(np.int64)


def documents(corpus: Corpus, sequences: TokenSequences) -> list[str]:
    text = corpus.tokenizer.decode(stored(sequences).tolist())
    assert text.endswith("<|endoftext|>")
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>")


def all_documents(corpus: Corpus) -> list[str]:
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    if corpus.info["validation"] == "tails of the documents":
        return sorted(head + tail for head, tail in zip(train, validation, strict=True))
    return sorted(train + validation)


def table_bytes(texts: list[str | None], tmp_path: Path, column: str = "text") -> bytes:
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, tmp_path / "made")
    return (tmp_path / "made").read_bytes()


def refused(tmp_path: Path, data: list[str] | None, **settings) -> str:
    """The one-sentence message of the SettingError; no unfinished build is left behind."""
    with pytest.raises(SettingError) as caught:
        build(tmp_path, data, **settings)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob(".building-*"))
    return str(caught.value)
