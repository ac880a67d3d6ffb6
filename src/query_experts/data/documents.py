"""From texts to split documents: exact duplicates dropped, a byte limit kept, and a held-out validation split."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Document:
    """A text, its length in UTF-8 bytes, and its place in [0, 1), a hash of the text as it was before any cut."""

    text: str
    size: int
    place: float


class SplitDocuments:
    """Iterates once over `texts` as (split, text, UTF-8 bytes).

    - A text seen before is dropped (`duplicates` counts them), and so is one of white space only.
    - The document that reaches `max_bytes` is the last; it is cut there, at a line break where it has one.
    - With `tails` the last `validation_fraction` of every document is held out, from a line break on.
    - Without, a document is held out when the hash of its text, read as a number in [0, 1), is below
      `validation_fraction`, so the split does not depend on the order of the documents, on a seed or on the machine.
      Were one side empty, the document nearest to that threshold goes there. An only document gives its tail here too,
      and `tails` is true from then on.
    """

    def __init__(
        self, texts: Iterable[str], validation_fraction: float, max_bytes: int | None, tails: bool = False
    ) -> None:
        self.duplicates = 0
        self.documents = 0
        self.tails = tails
        self._texts = texts
        self._fraction = validation_fraction
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes

    def __iter__(self) -> Iterator[tuple[Split, str, int]]:
        for split, document in self._tails() if self.tails else self._split():
            yield split, document.text, document.size

    def _tails(self) -> Iterator[tuple[Split, Document]]:
        for document in self._unique():
            yield from self._cut_tail(document.text)

    def _split(self) -> Iterator[tuple[Split, Document]]:
        """The document nearest to the threshold is held back for as long as all documents fall on one side of it."""
        held: Document | None = None
        first: Split | None = None
        for document in self._unique():
            side = self._side(document)
            if first is None:
                held, first = document, side
            elif held is None:
                yield side, document
            elif side != first:
                yield first, held
                held = None
                yield side, document
            else:
                near, far = sorted((held, document), key=lambda one: abs(one.place - self._fraction))
                held = near
                yield first, far
        if held is None:
            return
        self.tails = self.documents == 1
        if self.tails:
            yield from self._cut_tail(held.text)
        else:
            yield "train" if first == "validation" else "validation", held

    def _side(self, document: Document) -> Split:
        return "validation" if document.place < self._fraction else "train"

    def _unique(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        room = self._max_bytes
        for text in self._texts:
            if not text.strip():
                continue
            encoded = text.encode()
            digest = hashlib.sha256(encoded).digest()
            if digest[:16] in seen:
                self.duplicates += 1
                continue
            seen.add(digest[:16])
            last = len(encoded) >= room
            if len(encoded) > room:
                encoded = _head(encoded, room)
                text = encoded.decode()
            if text.strip():
                self.documents += 1
                yield Document(text, len(encoded), int.from_bytes(digest[:8], "big") / 2**64)
            if last:
                return
            room -= len(encoded)

    def _cut_tail(self, text: str) -> Iterator[tuple[Split, Document]]:
        """The line break nearest to the mark that leaves between half and twice the tail asked for, else the mark."""
        mark = int(len(text) * (1 - self._fraction))
        tail = len(text) - mark
        cuts = (text.rfind("\n", max(0, mark - tail), mark) + 1, text.find("\n", mark, mark + tail // 2) + 1)
        cut = min((cut for cut in cuts if cut), key=lambda cut: abs(cut - mark), default=mark)
        for split, part in zip(SPLITS, (text[:cut], text[cut:]), strict=True):
            if part:
                yield split, Document(part, len(part.encode()), 0.0)


def _head(encoded: bytes, size: int) -> bytes:
    """At most `size` bytes from the start of UTF-8 text: whole lines where they are more than half of that."""
    lines = encoded[: encoded.rfind(b"\n", 0, size) + 1]
    fills = 2 * len(lines) > size and lines.strip()
    return lines if fills else encoded[:size].decode(errors="ignore").encode()
