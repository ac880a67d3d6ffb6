"""Splits texts into training and validation documents: drops exact duplicates and stops at a byte limit."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Document:
    """A text, its length in UTF-8 bytes, and a hash of the text before any cut, as a number in [0, 1)."""

    text: str
    size: int
    hash: float


class SplitDocuments:
    """Iterates once over `texts` as (split, text, UTF-8 bytes).

    - A text that occurred before is dropped, and so is one of white space only. `duplicates` counts the former, and
      `digests` holds the digest of each text that was read.
    - The document that reaches `max_bytes` is the last. It is cut there, at a line break if it has one.
    - With `tails`, the last `validation_fraction` of every document is held out, from a line break on.
    - Without `tails`, a document is held out when the hash of its text is below `validation_fraction`. So the split
      doesn't depend on the order of the documents, on a seed or on the machine. If one split would stay empty, it gets
      the document whose hash is nearest to that threshold. If there is only one document, its tail is held out, and
      `tails` is true from then on.
    - With a `validation_fraction` of None every document is for training.
    """

    def __init__(
        self, texts: Iterable[str], validation_fraction: float | None, max_bytes: int | None, tails: bool = False
    ) -> None:
        self.duplicates = 0
        self.documents = 0
        self.digests: set[bytes] = set()
        self.tails = tails
        self._texts = texts
        self._fraction = validation_fraction
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes

    def __iter__(self) -> Iterator[tuple[Split, str, int]]:
        for split, document in self._sides():
            yield split, document.text, document.size

    def _sides(self) -> Iterator[tuple[Split, Document]]:
        if self._fraction is None:
            yield from (("train", document) for document in self._unique())
        elif self.tails:
            for document in self._unique():
                yield from self._cut_tail(document.text, self._fraction)
        else:
            yield from self._split(self._fraction)

    def _split(self, fraction: float) -> Iterator[tuple[Split, Document]]:
        """While all documents fall into one split, the one nearest to the threshold is held back for the other."""
        held_back: Document | None = None
        first: Split | None = None
        for document in self._unique():
            split: Split = "validation" if document.hash < fraction else "train"
            if first is None:
                held_back, first = document, split
            elif held_back is None:
                yield split, document
            elif split != first:
                yield first, held_back
                held_back = None
                yield split, document
            else:
                near, far = sorted((held_back, document), key=lambda one: abs(one.hash - fraction))
                held_back = near
                yield first, far
        if held_back is None:
            return
        self.tails = self.documents == 1
        if self.tails:
            yield from self._cut_tail(held_back.text, fraction)
        else:
            yield "train" if first == "validation" else "validation", held_back

    def _unique(self) -> Iterator[Document]:
        """The texts without duplicates and blank ones, up to the byte limit."""
        room = self._max_bytes
        for text in self._texts:
            if not text.strip():
                continue
            encoded = text.encode()
            digest = digest_of(encoded)
            if digest in self.digests:
                self.duplicates += 1
                continue
            self.digests.add(digest)
            last = len(encoded) >= room
            if len(encoded) > room:
                encoded = head(encoded, room)
                text = encoded.decode()
            if text.strip():
                self.documents += 1
                yield Document(text, len(encoded), int.from_bytes(digest[:8], "big") / 2**64)
            if last:
                return
            room -= len(encoded)

    def _cut_tail(self, text: str, fraction: float) -> Iterator[tuple[Split, Document]]:
        """Cut at the nearest line break that leaves a tail of half to twice the exact length, else at the exact place.

        Lengths are in characters.
        """
        exact = int(len(text) * (1 - fraction))
        tail = len(text) - exact
        cuts = (text.rfind("\n", max(0, exact - tail), exact) + 1, text.find("\n", exact, exact + tail // 2) + 1)
        cut = min((cut for cut in cuts if cut), key=lambda cut: abs(cut - exact), default=exact)
        for split, part in zip(SPLITS, (text[:cut], text[cut:]), strict=True):
            if part:
                yield split, Document(part, len(part.encode()), 0.0)


def digest_of(encoded: bytes) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.sha256(encoded).digest()[:16]


def head(encoded: bytes, size: int) -> bytes:
    """At most `size` bytes from the start of UTF-8 text: whole lines if they fill more than half of them."""
    lines = encoded[: encoded.rfind(b"\n", 0, size) + 1]
    keeps_lines = 2 * len(lines) > size and lines.strip()
    return lines if keeps_lines else encoded[:size].decode(errors="ignore").encode()
