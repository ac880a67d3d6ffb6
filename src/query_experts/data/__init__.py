"""Turns text into tokens on disk and serves them as sequences of one length: the public names of this package."""

from query_experts.data.corpus import Corpus, prepare
from query_experts.data.facts import CorpusInfo, ValidationPart
from query_experts.data.folder import missing_files, read_meta
from query_experts.data.portion import write_portion
from query_experts.data.shards import TokenSequences

__all__ = [
    "Corpus", "CorpusInfo", "TokenSequences", "ValidationPart", "missing_files", "prepare", "read_meta",
    "write_portion",
]  # fmt: skip
