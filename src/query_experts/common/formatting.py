"""Formats numbers and lists of words for tables, pages and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MISSING = DASH
DIVERGED = "diverged"


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign: +0.0031. A value that rounds to zero has no sign."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def fixed(value: float | None, digits: int = 4) -> str:
    """A number with that many decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    """A signed interval in brackets; empty without bounds."""
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def short(value: float | None) -> str:
    """A count in three digits and a unit: 2.40M, 12.3k."""
    if value is None or not math.isfinite(value):
        return MISSING
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            return _three_digits(value / scale) + unit
    return f"{value:.3g}"


def storage(num_bytes: float) -> str:
    """A size in three digits and a unit: 60.1 GB, 4.24 MB."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= 0.9995 * scale:
            return f"{_three_digits(num_bytes / scale)} {unit}"
    return f"{_three_digits(num_bytes / 1e3)} kB"


def duration(seconds: float | None) -> str:
    """Seconds in three digits and a unit: 1.24 s, 29.9 ms."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    return f"{_three_digits(seconds)} s" if seconds >= 0.9995 else f"{_three_digits(1e3 * seconds)} ms"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def whole(value: float | None) -> str:
    """A rounded number with separators: 12,345."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def times(value: float | None) -> str:
    """A ratio: 1.31×."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}{TIMES}"


def length_name(length: int) -> str:
    """A sequence length in units of 1,024 where it is a multiple: 512, 2k, 128k."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def plural(count: int, word: str) -> str:
    """A count and its word: 1 seed, 2 seeds."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def join_words(words: Sequence[str]) -> str:
    """A list of words in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def name_seeds(numbers: Sequence[int]) -> str:
    """Seeds in a sentence: seed 1, seeds 0 and 2."""
    return f"seed{'s' if len(numbers) > 1 else ''} {join_words([str(number) for number in numbers])}"
