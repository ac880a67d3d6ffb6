"""Reads JSON files as dataclasses with the standard library only, since a GPU machine has no pydantic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json

Result = TypeVar("Result")


def read_result(path: Path, kind: type[Result], what: str) -> Result:
    """Reads a JSON file as a dataclass.

    Args:
        what: The file in words, with its article.

    Raises:
        SettingError: The file holds something else; the sentence names what doesn't fit.
    """
    try:
        return parse(kind, parse_json(path.read_text(encoding="utf-8")), "")
    except (ValueError, RecursionError) as error:
        raise SettingError(f"result is {path}, which isn't {what}: {error}") from error


def parse(kind: Any, value: Any, place: str) -> Any:
    """A value from JSON as the type `kind`: a dataclass, a list, a named tuple, a dictionary, a union or a scalar.

    Raises ValueError, naming the place in the file, for a value of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return parse(arguments[0], value, place)
    if origin in (Union, UnionType):
        return _parse_union(arguments, value, place)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _parse_dataclass(kind, value, place)
    if origin is list and isinstance(value, list):
        return [parse(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value)]
    if _is_named_tuple(kind) and isinstance(value, list) and len(value) == len(kind._fields):
        return kind(
            *(parse(hint, item, place) for hint, item in zip(get_type_hints(kind).values(), value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: parse(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if value in arguments if origin is Literal else _is_scalar(kind, value):
        return value
    raise ValueError(f"{place.removeprefix('.') or 'the file'} is {_shown(value)}; it must be {_name(kind)}")


def _parse_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    """The first of the types that fits."""
    errors = []
    for kind in kinds:
        try:
            return parse(kind, value, place)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _parse_dataclass(kind: Any, value: dict[str, Any], place: str) -> Any:
    """Files of older versions may lack a field that has a default, or that may be None.

    They may also hold one that has become another; the class names it in `older`.
    """
    hints = get_type_hints(kind, include_extras=True)
    value = dict(value)
    for name, (new_name, meanings) in getattr(kind, "older", {}).items():
        if name in value:
            value[new_name] = meanings[parse(bool, value.pop(name), f"{place}.{name}")]
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in value:
        if name not in fields:
            raise ValueError(f"{f'{place}.{name}'.removeprefix('.')} is no field of {kind.__name__}")
    given = {name: parse(hints[name], value[name], f"{place}.{name}") for name in fields if name in value}
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in given and not has_default:
            if NoneType not in get_args(hints[name]):
                raise ValueError(f"{f'{place}.{name}'.removeprefix('.')} is missing")
            given[name] = None
    return kind(**given)


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind in (None, NoneType):
        return value is None
    if kind is float:  # JSON may write 1.0 as 1
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(kind, type) and type(value) is kind


def _name(kind: Any) -> str:
    """A type as a sentence names it: int, list[int], or the values that it allows."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return str(kind) if get_args(kind) else getattr(kind, "__name__", str(kind))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
