"""Reads the settings of a command from a preset, a recipe in YAML and the command line, and validates settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from query_experts.common.errors import SettingError
from query_experts.common.fields import Limit, OutOfLimits, Settings
from query_experts.common.options import SettingsParser, choices
from query_experts.common.yaml_reader import read_yaml

Kind = TypeVar("Kind", bound=Settings)


def parse_settings(
    kind: type[Kind],
    argv: list[str],
    *,
    prog: str,
    about: str,
    example: str = "",
    folder: str | None = None,
    preset: str = "",
    also_known: Iterable[str] = (),
    out_follows_preset: bool = True,
) -> Kind:
    """Returns the settings that a command line asks for.

    Args:
        kind: The class of settings.
        argv: The words after the command's name.
        prog: The command, as the user writes it.
        about: What it does, in a line.
        example: One whole command, for the help page.
        folder: The folder of the package that holds the command's presets; None for a command without presets.
        preset: The preset that is used by default.
        also_known: Settings of other commands, which a recipe may set and which are passed over.
        out_follows_preset: Whether results go to `runs/PRESET` unless something else is said.

    Raises:
        SettingError: The command line, the preset or the recipe can't be understood. Values are checked by `check`
            of the settings.
        SystemExit: After --help.
    """
    parser = SettingsParser(kind, prog=prog, about=about, example=example)
    from_recipe: set[str] = set()
    if folder is not None:
        from_recipe = _use_recipes(parser, argv, presets(folder), preset, {*also_known}, out_follows_preset)
    settings, *others, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    for word in unknown:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if name in kind.refused:
            raise SettingError(f"{name} {kind.refused[name]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, default in kind.elsewhere.defaults.items():
        if (value := getattr(others[0], name)) != default:
            raise SettingError(f"{name} is {value!r}, {kind.elsewhere.why}")
    if hasattr(settings, "given"):
        words = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word[:2] == "--"}
        settings.given = frozenset({f.name for f in fields(kind)} & {*from_recipe, *words})  # type: ignore[arg-type]
    return settings


def _use_recipes(
    parser: SettingsParser,
    argv: list[str],
    known: dict[str, Any],
    preset: str,
    also_known: set[str],
    out_follows_preset: bool,
) -> set[str]:
    """Sets the parser's defaults to those of the preset, and of the recipe, that the command line asks for.

    Returns the names that the recipe sets.
    """
    elsewhere = parser.kind.elsewhere
    recipes = {name: read_recipe(path) for name, path in sorted(known.items())}
    own = [name for name, recipe in recipes.items() if not elsewhere.has_settings_of(recipe)]
    parser.add_preset_options(preset, own)
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--preset", default=preset)
    choice.add_argument("--recipe")
    choice.error = parser.error  # type: ignore[method-assign]
    chosen, _ = choice.parse_known_args(argv)
    if chosen.preset not in known:
        raise SettingError(f"preset is {chosen.preset!r}; it must be one of {', '.join(own)}")
    if chosen.preset not in own:
        raise SettingError(f"preset is {chosen.preset!r}, {elsewhere.why}")
    if out_follows_preset:
        parser.set_defaults(out=f"runs/{chosen.preset}")
    use_recipe(parser, known[chosen.preset], recipes[chosen.preset], also_known)
    if chosen.recipe is None:
        return set()
    recipe = read_recipe(Path(chosen.recipe))
    use_recipe(parser, Path(chosen.recipe), recipe, also_known)
    return {*recipe}


def use_recipe(parser: SettingsParser, path: Any, recipe: dict[str, Any], also_known: set[str]) -> None:
    """Sets defaults of the parser to a recipe's values. Settings that are only `also_known` are passed over.

    Raises SettingError, naming the recipe, for an unknown setting and for a value that a setting can't take.
    """
    hints = get_type_hints(parser.kind)
    names = {f.name for f in fields(parser.kind)} | parser.kind.elsewhere.defaults.keys()  # type: ignore[arg-type]
    names -= parser.kind.not_of_recipes
    for name, value in recipe.items():
        if name not in names | also_known:
            offered = (names | also_known) - parser.kind.elsewhere.defaults.keys()
            raise SettingError(f"recipe {path} sets {name!r}; it must be one of {', '.join(sorted(offered))}")
        if name not in names:
            continue
        option = parser.option(name)
        if value is None and NoneType not in get_args(hints.get(name, str | None)):
            raise SettingError(f"recipe {path} sets {name} to null; it must have a value")
        if isinstance(value, dict) or (isinstance(value, list) and option.nargs != "+"):
            raise SettingError(f"recipe {path} sets {name} to {value!r}; it must be one value")
        parser.set_defaults(**{name: None if value is None else _convert(option, value, path, parser)})


def _convert(option: argparse.Action, value: Any, path: Any, parser: SettingsParser) -> Any:
    """A value of a YAML file with the type of its option: to YAML, `1e-3` is text and 9 isn't a float."""
    convert: Any = option.type or str
    found = []
    for item in value if isinstance(value, list) else [value]:
        try:
            found.append(convert(str(item)))
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            fault = f"argument {'/'.join(option.option_strings)}: invalid {convert.__name__} value: {item!r}"
            raise SettingError(f"recipe {path}: {parser.point_to_help(fault)}") from error
    return found if option.nargs == "+" else found[0]


def presets(folder: str) -> dict[str, Any]:
    """Preset -> its recipe, of those that come with the package."""
    recipes = files("query_experts") / folder
    return {p.name.removesuffix(".yaml"): p for p in recipes.iterdir() if p.name.endswith(".yaml")}


def read_recipe(path: Any) -> dict[str, Any]:
    """The settings in a YAML file. Raises SettingError for a file that holds none, or one that doesn't exist."""
    try:
        recipe = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingError(f"recipe is {path}, which doesn't exist; it must be a YAML file of settings") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingError(f"recipe is {path}, which can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise SettingError(f"recipe is {path}; it must hold lines of `setting: value`")
    return recipe


TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "True or False",
    "list_type": "a list",
}


def validate(settings: Settings) -> None:
    """Checks the type and the limits of every field, with pydantic.

    Where it isn't installed, as on a machine that only generates or runs benchmarks/gpu.py, only limits and words are
    checked: the command line has converted the types.

    Raises:
        SettingError: A field that can't be used, with what it held and what is allowed.
    """
    for name in ("out", "cache_dir"):
        _check_written_name(name, getattr(settings, name, None))
    try:
        from pydantic import TypeAdapter, ValidationError
    except ModuleNotFoundError:
        hints = get_type_hints(type(settings), include_extras=True)
        for field in fields(settings):  # type: ignore[arg-type]
            _check_value(field.name, getattr(settings, field.name), hints[field.name], getattr(settings, field.name))
        return
    try:
        TypeAdapter(type(settings)).validate_python(settings)
    except ValidationError as error:
        raise SettingError(_sentence(settings, error.errors()[0])) from error


def _check_written_name(name: str, value: Any) -> None:
    """Raises SettingError for a name that isn't UTF-8: the tokenizers package writes to none."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise SettingError(
            f"{name} is {value!r}, which isn't UTF-8, or is for a locale that isn't; it must be a name in UTF-8 "
            "(PYTHONUTF8=1 reads it so in any locale)"
        ) from error


def _check_value(name: str, value: Any, hint: Any, whole: Any) -> None:
    """Checks a value, which is `whole` or an entry of it, against the limits and words in its type."""
    if get_origin(hint) is Annotated:
        inner, *limits = get_args(hint)
        _check_value(name, value, inner, whole)
        for limit in limits:
            if isinstance(limit, Limit) and not limit.allows(value):
                raise SettingError(limit.sentence(name, value, whole))
    elif get_origin(hint) in (Union, UnionType):
        if value is not None:
            _check_value(name, value, get_args(hint)[0], whole)
    elif get_origin(hint) is list:
        for entry in value:
            _check_value(name, entry, get_args(hint)[0], whole)
    elif get_origin(hint) is Literal and value not in get_args(hint):
        raise SettingError(_wrong_word(name, value, get_args(hint), in_list=isinstance(whole, list)))


def _wrong_word(name: str, value: Any, allowed: tuple[str, ...], in_list: bool) -> str:
    if in_list:
        return f"{name} holds {value!r}; allowed are {', '.join(allowed)}"
    return f"{name} is {value!r}; it must be {' or '.join(filter(None, [', '.join(allowed[:-1]), allowed[-1]]))}"


def _sentence(settings: Settings, error: Any) -> str:
    """A validation error of pydantic in one sentence."""
    name, *place = error["loc"]
    value, cause = error["input"], error.get("ctx", {}).get("error")
    if isinstance(cause, OutOfLimits):
        return cause.limit.sentence(name, value, getattr(settings, name))
    hint = get_type_hints(type(settings))[name]
    optional = ("none",) if NoneType in get_args(hint) else ()
    if error["type"] == "literal_error":
        return _wrong_word(name, value, choices(hint) + optional, in_list=bool(place))
    allowed = TYPES.get(error["type"], error["msg"])
    if place:
        return f"{name} holds {value!r}; each entry must be {allowed}"
    return _wrong_word(name, value, (allowed, *optional), in_list=False)


def default_of(settings: Any, name: str) -> Any:
    """The default of a setting that isn't a list."""
    return next(f.default for f in fields(settings) if f.name == name)
