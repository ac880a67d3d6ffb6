"""Splits texts into training and validation documents: drops exact duplicates and stops at a byte limit."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from query_experts.data.digests import Digests

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
      `digests` holds the digest of each text that was read: 24 to 48 bytes of memory a document. A `log`
      that isn't None gets each of them as it comes.
    - The document that reaches `max_bytes` is the last. It is cut there, at a line break if it has one.
    - With `tails`, the last `validation_fraction` of every document is held out, from a line break on.
    - Without `tails`, a document is held out when the hash of its text is below `validation_fraction`. So the split
      doesn't depend on the order of the documents, on a seed or on the machine. If one split would stay empty, it gets
      the document whose hash is nearest to that threshold. If there is only one document, its tail is held out, and
      `tails` is true from then on.
    - With a `validation_fraction` of None every document is for training.

    `finished` is true once all texts are read: no document comes after those of the last group.
    """

    def __init__(
        self, texts: Iterable[str], validation_fraction: float | None, max_bytes: int | None, tails: bool = False
    ) -> None:
        self.duplicates = 0
        self.documents = 0
        self.digests = Digests()
        self.tails = tails
        self.log: bytearray | None = None
        self.finished = False
        self._texts = texts
        self._fraction = validation_fraction
        self._room = sys.maxsize if max_bytes is None else max_bytes
        self._first: Split | None = None  # the side of the first document
        self._held_back: Document | None = None

    def __iter__(self) -> Iterator[tuple[Split, str, int]]:
        for documents in self.by_text():
            yield from documents

    def by_text(self) -> Iterator[list[tuple[Split, str, int]]]:
        """The documents that each text gives, and at the end the one that was held back.

        Between two of them the state is that after the whole text.
        """
        for text in self._texts:
            yield self._sized(self._sides(text))
            if self._room <= 0:
                break
        rest = self._sized(self._rest())
        self.finished = True
        yield rest

    def state(self) -> dict[str, Any]:
        """What `restore` needs beside the digests, as JSON can hold it."""
        held_back = None if self._held_back is None else asdict(self._held_back)
        return {
            "duplicates": self.duplicates, "documents": self.documents, "digests": len(self.digests),
            "tails": self.tails, "room": self._room, "first": self._first, "held_back": held_back,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state. The texts are then those after it, and the digests must have been added."""
        self.duplicates, self.documents, self.tails = state["duplicates"], state["documents"], state["tails"]
        self._room, self._first = state["room"], state["first"]
        self._held_back = None if state["held_back"] is None else Document(**state["held_back"])
        if self._room <= 0:
            self._texts = ()

    @staticmethod
    def _sized(sides: Iterable[tuple[Split, Document]]) -> list[tuple[Split, str, int]]:
        return [(split, document.text, document.size) for split, document in sides]

    def _sides(self, text: str) -> Iterator[tuple[Split, Document]]:
        document = self._unique(text)
        if document is None:
            return
        if self._fraction is None:
            yield "train", document
        elif self.tails:
            yield from self._cut_tail(document.text, self._fraction)
        else:
            yield from self._split(document, self._fraction)

    def _split(self, document: Document, fraction: float) -> Iterator[tuple[Split, Document]]:
        """While all documents fall into one split, the one nearest to the threshold is held back for the other."""
        split: Split = "validation" if document.hash < fraction else "train"
        if self._first is None:
            self._held_back, self._first = document, split
        elif self._held_back is None:
            yield split, document
        elif split != self._first:
            yield self._first, self._held_back
            self._held_back = None
            yield split, document
        else:
            near, far = sorted((self._held_back, document), key=lambda one: abs(one.hash - fraction))
            self._held_back = near
            yield self._first, far

    def _rest(self) -> Iterator[tuple[Split, Document]]:
        """The document that is still held back, for the split that has none; the tail of an only one."""
        if self._fraction is None or self._held_back is None:
            return
        held_back, self._held_back = self._held_back, None
        self.tails = self.documents == 1
        if self.tails:
            yield from self._cut_tail(held_back.text, self._fraction)
        else:
            yield "train" if self._first == "validation" else "validation", held_back

    def _unique(self, text: str) -> Document | None:
        """The text, up to the byte limit; None for a duplicate or a blank one."""
        if not text.strip():
            return None
        encoded = text.encode()
        digest = digest_of(encoded)
        if not self.digests.add(digest):
            self.duplicates += 1
            return None
        if self.log is not None:
            self.log += digest
        room = self._room
        if len(encoded) > room:
            encoded = head(encoded, room)
            text = encoded.decode()
            self._room = 0
        else:
            self._room -= len(encoded)
        if not text.strip():
            return None
        self.documents += 1
        return Document(text, len(encoded), int.from_bytes(digest[:8], "big") / 2**64)

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
