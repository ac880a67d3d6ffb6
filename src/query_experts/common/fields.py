"""Declares the fields of settings: their defaults, limits, help texts and groups on the help page.

Limits are marks in `Annotated` types which pydantic finds and calls. Nothing here imports pydantic, so that settings
can be built where it isn't installed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar


class OutOfLimits(ValueError):
    """A value that a limit refuses."""

    def __init__(self, limit: Limit):
        super().__init__(str(limit))
        self.limit = limit


class Limit:
    """What a field may hold beyond its type."""

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def sentence(self, name: str, value: Any, whole: Any) -> str:
        """The refusal. `value` is what was refused, `whole` the field that it is in: itself, or a list."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """The value. Raises OutOfLimits."""
        if not self.allows(value):
            raise OutOfLimits(self)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


@dataclass(frozen=True)
class Bounds(Limit):
    """A range of finite numbers.

    Args:
        noun: What the number is, for a sentence that says so: "a seed".
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    noun: str = ""

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def range(self, number: bool) -> str:
        if self.above > -math.inf:
            return f"a number above {self.above}" + f" and at most {self.most}" * (self.most < math.inf)
        if self.most < math.inf:
            return f"{self.least} to {self.most}"
        if self.below < math.inf:
            return f"{self.least} or more and below {self.below}"
        return f"{'a number, ' * number}{self.least} or more"

    def sentence(self, name: str, value: float, whole: Any) -> str:
        allowed = self.range(number=isinstance(value, float))
        if self.noun:
            return f"{name} holds {value!r}; {self.noun} must be {allowed}"
        if isinstance(whole, list):
            return f"{name} holds {whole}; it must hold numbers of {allowed}"
        return f"{name} is {value!r}; it must be {allowed}"


@dataclass(frozen=True)
class NotEmpty(Limit):
    """Some text. `must` ends the sentence: "be a folder"."""

    must: str

    def allows(self, value: str) -> bool:
        return bool(value)

    def sentence(self, name: str, value: str, whole: Any) -> str:
        return f"{name} is empty; it must {self.must}"


@dataclass(frozen=True)
class Distinct(Limit):
    """A list with at least one entry, and no entry twice. `of` names the entries that there are."""

    of: tuple[str, ...] = ()

    def allows(self, value: list[Any]) -> bool:
        return len(value) == len({*value}) > 0

    def sentence(self, name: str, value: list[Any], whole: Any) -> str:
        if not value and self.of:
            return f"{name} is empty; it must hold one or more of {', '.join(self.of)}"
        if not value:
            return f"{name} holds []; it must hold one or more, each once"
        return f"{name} holds {value}; it must hold each {'number ' * isinstance(value[0], int)}once"


Count = Annotated[int, Bounds(least=1)]
Counts = Annotated[list[Count], Distinct()]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1, noun="a seed")]
Share = Annotated[float, Bounds(least=0, most=1)]
NonNegative = Annotated[float, Bounds(least=0)]
OutFolder = Annotated[str, NotEmpty("be a folder")]


@dataclass(frozen=True)
class Elsewhere:
    """Options of another command, or of an earlier version, which this one refuses.

    Args:
        defaults: Name -> the value that isn't refused, as it changes nothing.
        why: The rest of the sentence after "name is value".
    """

    defaults: dict[str, Any]
    why: str

    def has_settings_of(self, recipe: dict[str, Any]) -> bool:
        """Whether a recipe is for that other command."""
        return any(recipe.get(name, default) != default for name, default in self.defaults.items())


class Settings:
    """Base of the settings of all commands. They are dataclasses whose fields `option` and `argument` declare."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "revalidate_instances": "always"}
    elsewhere: ClassVar[Elsewhere] = Elsewhere({}, "")
    refused: ClassVar[dict[str, str]] = {}  # options that people may look for -> why there are none
    unlisted: ClassVar[frozenset[str]] = frozenset()  # settings that the help page leaves out
    not_of_recipes: ClassVar[frozenset[str]] = frozenset()  # settings that only the command line sets


def help_entry(text: str, group: str, **more: Any) -> dict[str, Any]:
    """The metadata of a field: what its help page says.

    Args:
        group: The heading of the page under which the option is listed.
        more: metavar: the word for the value; none_is_a_word: `none` on the command line is a value like any other.
    """
    return {"help": text, "group": group, **more}


def option(default: Any, text: str, group: str, **more: Any) -> Any:
    """A setting that the command line gives as `--name value`. For the arguments see `help_entry`."""
    metadata = help_entry(text, group, **more)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required_option(text: str, group: str, **more: Any) -> Any:
    """An option without a default."""
    return dataclasses.field(metadata=help_entry(text, group, **more))


def argument(text: str) -> Any:
    """A setting that the command line gives by its position."""
    return dataclasses.field(metadata=help_entry(text, "arguments", positional=True))
