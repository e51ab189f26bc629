"""The one converter from plain values (of a TOML file or of the command line) to the types of the schema.

Types are strict: nothing becomes a number or a string by itself. Three conveniences cannot be misread and are
allowed: an integer where a number with a fraction is expected, a float without a fraction (`1e4`) where an integer is
expected, and the word `none` for a setting that may be unset, since TOML has no null.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from trainer.config.fields import format_choices, get_type_hints, is_section, suggest

_LARGEST_EXACT_FLOAT = 2**53  # beyond it a float no longer tells neighbouring integers apart


class ConversionError(ValueError):
    """A value does not have the type of its setting. The text says what was expected and what was found.

    `path` leads to the culprit inside a list or table: indices (from 0) and names.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


def convert(value: Any, annotation: Any) -> Any:
    """`value` as the type `annotation` asks for.

    Args:
        value: what a TOML parser returns: str, int, float, bool, list, dict or a date.
        annotation: a resolved annotation of the schema.

    Raises:
        ConversionError: the value is of another type, or outside the listed choices.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(value, annotation)
    if origin is Literal:
        return _convert_choice(value, typing.get_args(annotation))
    if origin is list:
        return _convert_list(value, typing.get_args(annotation)[0])
    if is_section(annotation):
        return _convert_table(value, annotation)
    return _convert_scalar(value, annotation)


def describe_type(annotation: Any) -> str:
    """What a setting of this type takes, in words for a message."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return f"{describe_type(inner[0])}, or none"
    if origin is Literal:
        return format_choices(typing.get_args(annotation))
    if origin is list:
        item = typing.get_args(annotation)[0]
        if typing.get_origin(item) is Literal:
            return f"a list of {describe_type(item)}"
        return "a list of " + {str: "strings", int: "integers", float: "numbers"}.get(item, _plural(item))
    if is_section(annotation):
        return "a table"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[annotation]


def _plural(annotation: Any) -> str:
    if typing.get_origin(annotation) is list:
        return "lists of strings"
    return "tables"


def describe_value(value: Any) -> str:
    """A plain value and its type, in words for a message."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int):
        return f"the integer {value}"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'the string "{value}"'
    if isinstance(value, list):
        return f"the list {value}"
    if isinstance(value, dict):
        return "a table"
    return f"the date or time {value}"


def is_optional(annotation: Any) -> bool:
    """Whether the setting may be None."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in typing.get_args(
        annotation
    )


def _fail(value: Any, annotation: Any, remedy: str = "") -> typing.NoReturn:
    raise ConversionError(f"expected {describe_type(annotation)}, got {describe_value(value)}.{remedy}")


def _convert_optional(value: Any, annotation: Any) -> Any:
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    assert is_optional(annotation), f"the schema has a union without None: {annotation}"
    assert len(inner) == 1, f"the schema has a union of several types: {annotation}"
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    try:
        return convert(value, inner[0])
    except ConversionError:
        if typing.get_origin(inner[0]) is Literal or not isinstance(value, list | dict):
            _fail(value, annotation, _suggest_choice(value, inner[0]))
        raise


def _suggest_choice(value: Any, annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal and isinstance(value, str):
        return suggest(value, typing.get_args(annotation))
    return ""


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    annotation = Literal[choices]  # type: ignore[valid-type]
    return _fail(value, annotation, _suggest_choice(value, annotation))


def _convert_list(value: Any, item: Any) -> list[Any]:
    if not isinstance(value, list):
        remedy = f' Write ["{value}"].' if isinstance(value, str) and not is_section(item) else ""
        _fail(value, list[item], remedy)
    converted = []
    for index, element in enumerate(value):
        try:
            converted.append(convert(element, item))
        except ConversionError as error:
            raise ConversionError(f"item {index + 1}: {error}", (index, *error.path)) from None
    return converted


def _convert_table(value: Any, section: type) -> Any:
    if not isinstance(value, dict):
        _fail(value, section)
    hints = get_type_hints(section)
    arguments = {}
    for name, element in value.items():
        if name not in hints:
            known = format_choices(hints)
            message = f"unknown key {name}.{suggest(name, hints)} A table here has {known}."
            raise ConversionError(message, (name,))
        try:
            arguments[name] = convert(element, hints[name])
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}", (name, *error.path)) from None
    assert all(f.name in hints for f in dataclasses.fields(section)), f"{section} has a field without annotation"
    return section(**arguments)


def _convert_scalar(value: Any, annotation: Any) -> Any:
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is str and isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and is_number:
        if not math.isfinite(value):
            raise ConversionError(f"expected a finite number, got {value}.")
        return float(value)
    if annotation is int and is_number:
        if isinstance(value, int):
            return value
        if value.is_integer() and abs(value) <= _LARGEST_EXACT_FLOAT:
            return int(value)
    remedy = ""
    if annotation is str and is_number:
        remedy = f' Write it in quotes: "{value}".'
    elif annotation is not str and isinstance(value, str) and _is_literal(value, annotation):
        remedy = " Write it without quotes."
    return _fail(value, annotation, remedy)


def _is_literal(text: str, annotation: Any) -> bool:
    if annotation is bool:
        return text.lower() in ("true", "false")
    try:
        return math.isfinite(float(text)) and (annotation is float or float(text).is_integer())
    except ValueError:
        return False
