"""Makes the options of a command from the fields of its settings, and its help page."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import textwrap
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from query_experts.common.errors import SettingError
from query_experts.common.fields import Settings

# the page's headings in their order
GROUPS = ("arguments", "presets", "arms", "what to run", "distillation", "conversion", "data", "text", "tasks", "model",
          "training", "what to time", "prefill", "kernels", "machine", "processes", "watching", "time and cost",
          "output")  # fmt: skip
WIDTH, HELP_COLUMN = 100, 38
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}


class SettingsParser(HfArgumentParser):
    """An `HfArgumentParser` that refuses in one sentence and has a help page in groups.

    Args:
        kind: The class of settings; its fields are declared by `option`, `required_option` and `argument`.
        prog: The command, as the user writes it.
        about: What it does, in a line.
        example: One whole command.
    """

    def __init__(self, kind: type[Settings], *, prog: str, about: str, example: str):
        self.kind, self.example = kind, example
        self.sections: dict[str, list[argparse.Action]] = {}
        super().__init__(kind, prog=prog, description=about, allow_abbrev=False)
        for name, default in kind.elsewhere.defaults.items():
            convert = or_none(str) if default is None else type(default)
            self.add_argument(*spellings(name), default=default, type=convert, nargs="?", const="")

    def error(self, message: str) -> NoReturn:
        raise SettingError(self.point_to_help(message))

    def point_to_help(self, message: str) -> str:
        return f"{message}; {self.prog} --help lists what is allowed"

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints = get_type_hints(dtype)
        for field in dataclasses.fields(dtype):
            added = self._add_field(field, hints[field.name])
            if field.name not in dtype.unlisted:  # type: ignore[attr-defined]
                self.sections.setdefault(field.metadata["group"], []).append(added)

    def _add_field(self, field: dataclasses.Field, hint: Any) -> argparse.Action:
        if field.metadata.get("positional"):
            several = {"nargs": "+"} if get_origin(hint) is list else {}
            return self.add_argument(field.name, help=field.metadata["help"], **several)
        option = copy.copy(field)  # HfArgumentParser writes to it, and pydantic needs the field's own type
        option.metadata = {"help": field.metadata["help"]}  # type: ignore[assignment]
        option.type = without_literals(hint)
        self._parse_dataclass_field(self, option)
        added = self.option(field.name)
        added.metavar = field.metadata.get("metavar", metavar(hint))
        if NoneType in get_args(hint) and not field.metadata.get("none_is_a_word"):
            added.type = or_none(added.type)  # type: ignore[arg-type]
        return added

    def add_preset_options(self, preset: str, presets: list[str]) -> None:
        """Adds --preset, which chooses one of the presets, and --recipe."""
        help_text = f"settings to begin with: one of {', '.join(presets)}"
        self.sections["presets"] = [
            self.add_argument("--preset", default=preset, metavar="NAME", help=help_text),
            self.add_argument("--recipe", metavar="FILE", help="YAML file of settings, which replace the preset's"),
        ]

    def option(self, name: str) -> argparse.Action:
        """The option of a setting."""
        return self._option_string_actions[f"--{name}"]

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", flush=True)  # argparse's own ignores a closed pipe

    def format_help(self) -> str:
        """The help page."""
        lines = [f"{self.prog}: {self.description}", "", f"  {self.example}", ""]
        for group in sorted(self.sections, key=GROUPS.index):
            lines += [f"{group}:", *(line for option in self.sections[group] for line in format_option(option)), ""]
        lines += textwrap.wrap(NOTE, WIDTH)
        return "\n".join(lines) + "\n"


NOTE = "Names may be written with hyphens in place of underscores. none lifts an optional limit."


def spellings(name: str) -> list[str]:
    """A setting's options: with underscores, and with hyphens if that is another one."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def without_literals(hint: Any) -> Any:
    """The type with `str` for each Literal, since `validate` refuses wrong words, in a sentence."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is list:
        return list[without_literals(get_args(hint)[0])]  # type: ignore[misc]
    if get_origin(hint) in (Union, UnionType):
        return without_literals(get_args(hint)[0]) | None
    return hint


def choices(hint: Any) -> tuple[str, ...]:
    """The words of the Literal within a type, or none."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := choices(part))), ())


def metavar(hint: Any) -> str:
    """The word for a value of the type."""
    if words := choices(hint):
        return f"{{{','.join(words)}}}"
    return METAVARS.get(hint) or next(METAVARS[part] for part in get_args(hint) if part in METAVARS)


def or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion of an option, and the word `none` as None."""

    def converted(word: str) -> Any:
        return None if word == "none" else convert(word)

    converted.__name__ = convert.__name__  # argparse names it in its errors
    return converted


def format_option(option: argparse.Action) -> list[str]:
    """The lines of one option on the help page."""
    name = f"{option.option_strings[0]} {option.metavar}" if option.option_strings else option.dest
    name += " ..." if option.nargs == "+" else ""
    text, default = str(option.help), format_default(option.default)
    if default and "default:" not in text:
        text += f" (default: {default})"
    wrapped = textwrap.wrap(text, WIDTH - HELP_COLUMN, break_on_hyphens=False)
    if len(name) > HELP_COLUMN - 4:
        return [f"  {name}", *(" " * HELP_COLUMN + line for line in wrapped)]
    return [f"  {name}".ljust(HELP_COLUMN) + wrapped[0], *(" " * HELP_COLUMN + line for line in wrapped[1:])]


def format_default(value: Any) -> str:
    """A default as the command line takes it; nothing for None and empty values, which the help text explains."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
