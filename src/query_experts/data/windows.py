"""Tokenises a long text in windows, which bounds memory, with the tokens of the whole text.

Cut anywhere, a text has other tokens than as a whole: words, runs of white space and a first word's mark depend on what
is beside them. So neighbouring windows overlap, and one goes over into the next at a token that both have, in the
middle of the overlap, where neither knows of an end of the text.

Windows without such a token are joined, four at most. A run of so many characters without a place at which two windows
agree is no language. It is cut at a window's border, and its tokens there may differ from those of the whole text.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

_WINDOW_CHARACTERS = 1 << 20
_OVERLAP = 1 << 12  # characters
_AGREEING = 16  # tokens before and after the seam
_JOINED_WINDOWS = 4  # at most; each of them may be encoded as often


class Window(NamedTuple):
    """A part of a text. start: the characters of the text before it. last: whether the text ends with it."""

    start: int
    text: str
    last: bool

    @property
    def is_whole(self) -> bool:
        return self.last and self.start == 0


def windows_of(text: str) -> Iterator[Window]:
    """The text in windows of bounded length, each of which begins with the end of the one before it."""
    start = 0
    while len(text) - start > _WINDOW_CHARACTERS + _OVERLAP:
        yield Window(start, text[start : start + _WINDOW_CHARACTERS + _OVERLAP], last=False)
        start += _WINDOW_CHARACTERS
    yield Window(start, text[start:], last=True)


@dataclass(frozen=True)
class _Encoded:
    """A window's tokens. starts: where each begins in the text. first: the first that no earlier window gave."""

    window: Window
    ids: list[int]
    starts: list[int]
    first: int = 0
    begin: int = 0  # where the first begins in the text

    def until(self, end: int, stop: int | None = None) -> tuple[list[int], str]:
        """The tokens from the first one to `stop`, and the text from there to `end`."""
        offset = self.window.start
        return self.ids[self.first : stop], self.window.text[self.begin - offset : end - offset]


def _encoded(window: Window, encoding: Encoding) -> _Encoded:
    starts = [window.start + start for start, _ in encoding.offsets]
    return _Encoded(window, encoding.ids, starts, begin=window.start)


class JoinedWindows:
    """Joins the windows of one text, which come in order.

    Args:
        backend: the tokenizer that encodes the windows, without special tokens.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._before: _Encoded | None = None

    def add(self, window: Window, encoding: Encoding) -> Iterator[tuple[list[int], str]]:
        """Gives the tokens that are certain with one more window, and the text that they stand for."""
        after = _encoded(window, encoding)
        if (before := self._before) is not None:
            if (seam := _seam(before, after)) is not None:
                end, begin = seam
                place = before.starts[end]
                yield before.until(place, end)
                after = replace(after, first=begin, begin=place)
            elif (both := self._both(before, window)) is not None:
                after = both
            else:
                border = before.window.start + len(before.window.text)
                yield before.until(border)
                after = self._encode(Window(border, window.text[border - window.start :], window.last))
        self._before = after
        if window.last:
            yield after.until(window.start + len(window.text))

    def _both(self, before: _Encoded, window: Window) -> _Encoded | None:
        """The tokens of two windows as one: a long run without words has its tokens in another place in each.

        None where the two are too long, or have no token that begins where those already given end.
        """
        text = before.window.text[: window.start - before.window.start] + window.text
        if len(text) > _JOINED_WINDOWS * _WINDOW_CHARACTERS + _OVERLAP:
            return None
        encoded = self._encode(Window(before.window.start, text, window.last))
        first = bisect_left(encoded.starts, before.begin)
        if before.first and before.begin not in encoded.starts[first : first + 1]:
            return None
        return replace(encoded, first=first, begin=before.begin)

    def _encode(self, window: Window) -> _Encoded:
        return _encoded(window, self._backend.encode(window.text, add_special_tokens=False))


def _seam(before: _Encoded, after: _Encoded) -> tuple[int, int] | None:
    """The numbers of one token in both windows, with `_AGREEING` equal tokens on either side; None without any."""
    middle = after.window.start + _OVERLAP // 2
    shared = bisect_left(after.starts, after.window.start + _OVERLAP)
    numbers = {after.starts[number]: number for number in reversed(range(shared))}  # the first within a character
    for here in range(max(bisect_left(before.starts, middle), _AGREEING), len(before.ids) - _AGREEING):
        there = numbers.get(before.starts[here], 0)
        if there < _AGREEING or before.starts[here - 1] == before.starts[here]:
            continue
        mine, other = (slice(number - _AGREEING, number + _AGREEING) for number in (here, there))
        if before.ids[mine] == after.ids[other] and before.starts[mine] == after.starts[other]:
            return here, there
    return None
