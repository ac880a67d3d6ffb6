"""Says in a sentence what pydantic found wrong in a file's content."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from query_experts.common.fields import OutOfLimits

TYPE_WORDS = {  # what pydantic says of a type -> what we say
    "integer": "a whole number", "finite number": "a finite number", "number": "a number", "string": "text",
    "boolean": "true or false", "array": "a list", "list": "a list", "object": "lines of `field: value`",
    "dictionary": "lines of `field: value`",
}  # fmt: skip


def first_fault(error: ValueError) -> str:
    """The first fault that a reader found: the place in the file, and what is wrong there."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors()[0]
    place, held, cause = ".".join(map(str, fault["loc"])), fault["input"], fault.get("ctx", {}).get("error")
    if isinstance(cause, OutOfLimits):
        return cause.limit.sentence(place, held, held)
    if fault["type"] == "missing":
        return f"{place} isn't given; it must be"
    if fault["type"] == "unexpected_keyword_argument":
        return f"{place} is not known; it must be left out"
    wanted = fault["msg"].removeprefix("Input should be ")
    if wanted != fault["msg"]:
        words = next((words for kind, words in TYPE_WORDS.items() if kind in wanted), wanted)
        return f"{place or 'it'} is {shortened(held)}; it must be {words}"
    return ": ".join(filter(None, [place, fault["msg"]]))


def shortened(held: Any) -> str:
    """A value as Python writes it, in 60 characters."""
    text = repr(held)
    return text if len(text) <= 60 else f"{text[:57]}..."
