"""Text to tokens on disk to sequences of one length: the public names of the data module."""

from query_experts.data.corpus import Corpus, prepare
from query_experts.data.shards import TokenSequences

__all__ = ["Corpus", "TokenSequences", "prepare"]
