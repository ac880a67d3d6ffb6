"""Owns how commands get their settings: a preset, over it a recipe in YAML, over both the command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from query_experts.common.errors import SettingError

Settings = TypeVar("Settings")


class Options(argparse.ArgumentParser):
    """Refuses an option in one sentence, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        refuse_option(self, message)


def refuse_option(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SettingError(f"{message}; {parser.prog} --help lists what is allowed")


class SettingsOptions(HfArgumentParser):
    error = refuse_option


def parse_settings(
    kind: type[Settings],
    argv: list[str],
    *,
    prog: str,
    about: str,
    folder: str,
    preset: str,
    also_known: Iterable[str] = (),
    out_follows_preset: bool = True,
) -> Settings:
    """The settings of a command. folder: where in the package its presets lie; preset: the one by default.

    also_known: settings of other commands, which a recipe may set and which are passed over. out_follows_preset: the
    results go to `runs/PRESET`, if nothing else is said. Raises SettingError for what can't be understood.
    """
    known = presets(folder)
    parser = SettingsOptions(kind, prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--preset", default=preset, help=f"one of {', '.join(sorted(known))}")
    parser.add_argument("--recipe", help="a YAML file of settings, over the preset's")
    names, optional = {f.name for f in fields(kind)}, optional_fields(kind)  # type: ignore[arg-type]
    argv, lifted = without_none(argv, optional)
    first = parser.parse_args(argv)
    if first.preset not in known:
        raise SettingError(f"preset is {first.preset!r}; it must be one of {', '.join(sorted(known))}")
    recipe: dict[str, Any] = {"out": f"runs/{first.preset}"} if out_follows_preset else {}
    written: dict[str, Any] = {}
    for source in [known[first.preset], *([Path(first.recipe)] if first.recipe is not None else [])]:
        written = read_recipe(source, names | set(also_known))
        check_recipe(source, written, parser, names, optional)
        recipe |= written
    written = written if first.recipe is not None else {}  # by the user
    recipe = {name: value for name, value in recipe.items() if name in names}
    options = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    parser.set_defaults(**{name: value for name, value in recipe.items() if value is None or value == []})
    settings = parser.parse_args_into_dataclasses(as_options(recipe) + argv)[0]
    settings = dataclasses.replace(settings, **dict.fromkeys(lifted))
    if hasattr(settings, "given"):
        settings.given = frozenset(names & {*written, *options, *lifted})
    return settings


def optional_fields(kind: type) -> set[str]:
    """The settings that may be null in a recipe, and `none` on the command line."""
    hints = get_type_hints(kind)
    return {f.name for f in fields(kind) if type(None) in get_args(hints[f.name])}


def without_none(argv: list[str], optional: set[str]) -> tuple[list[str], list[str]]:
    """The words without any `--name none` or `--name=none` of an optional setting, and those that are last set so."""
    kept: list[str] = []
    last: dict[str, bool] = {}
    words = iter(range(len(argv)))
    for at in words:
        option, equals, value = argv[at].partition("=")
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else None
        if name not in optional:
            kept.append(argv[at])
            continue
        last[name] = value == "none" if equals else argv[at + 1 : at + 2] == ["none"]
        if not last[name]:
            kept.append(argv[at])
        elif not equals:
            next(words)  # `none` itself
    return kept, [name for name, lifted in last.items() if lifted]


def check_recipe(source: Any, held: dict[str, Any], parser: Any, names: set[str], optional: set[str]) -> None:
    """Raises SettingError, naming the recipe, for a value that its setting can't take."""
    for name, value in held.items():
        if name not in names:  # of the other command
            continue
        if value is None and name not in optional:
            raise SettingError(f"recipe {source} sets {name} to null; it must have a value")
        if value == [] and kind_of(parser, name) is None:
            raise SettingError(f"recipe {source} sets {name} to []; it must be one value")
        try:
            _, left = parser.parse_known_args(as_options({name: value}))
        except SettingError as error:
            raise SettingError(f"recipe {source}: {error}") from error
        if left:
            raise SettingError(f"recipe {source} sets {name} to {value!r}; it must be one value")


def kind_of(parser: Any, name: str) -> Any:
    """How many values an option takes: `*` or `+` for a list, None for one."""
    return next(action.nargs for action in parser._actions if action.dest == name)


def presets(folder: str) -> dict[str, Any]:
    """Preset -> its recipe, of those that come with the package."""
    recipes = files("query_experts") / folder
    return {p.name.removesuffix(".yaml"): p for p in recipes.iterdir() if p.name.endswith(".yaml")}


def read_recipe(path: Any, allowed: set[str]) -> dict[str, Any]:
    """The settings in a YAML file. Raises SettingError for a file that holds none, or one that doesn't exist."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingError(f"recipe is {path}, which doesn't exist; it must be a YAML file of settings") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"recipe is {path}, which can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise SettingError(f"recipe is {path}; it must hold lines of `setting: value`")
    for name in recipe:
        if name not in allowed:
            raise SettingError(f"recipe {path} sets {name!r}; it must be one of {', '.join(sorted(allowed))}")
    return recipe


def as_options(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line options, so that both are checked in one place."""
    options: list[str] = []
    for name, value in recipe.items():
        if value is not None and value != []:
            options += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return options


def field(default: Any, text: str) -> Any:
    """A dataclass field with the help that the command line prints."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def default_of(settings: Any, name: str) -> Any:
    """The default of a setting that isn't a list."""
    return next(f.default for f in fields(settings) if f.name == name)


def check_seeds(name: str, seeds: list[int]) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise SettingError(f"{name} holds {seed}; a seed must be 0 to {2**32 - 1}")
