"""Dotted overrides of the command line: `--section.key value`."""

import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import tomli

from trainer.config.convert import ConversionError, convert, is_optional
from trainer.config.errors import Problem
from trainer.config.fields import explain_unknown_key, get_leaves, get_sections, is_section
from trainer.config.toml_file import Setting, Settings

COMMAND_LINE = "command line"
_WORDS_FOR_BOOL = {"true": True, "1": True, "false": False, "0": False}


def read_arguments(argv: Sequence[str]) -> Settings:
    """Settings of the command line (without the program's name). The last of several for one key counts.

    Accepted: `--a.b value`, `--a.b=value`; for booleans also `--a.b` and `--a.no-b`; for lists several words or words
    joined by commas, or a TOML or JSON list; `none` for a setting that may be unset. `-` and `_` are one in names.
    What is wrong is collected, never raised.
    """
    settings = Settings()
    for name, words in _split(argv, settings.problems):
        try:
            key, value = _read_option(name, words)
        except ConversionError as error:
            key = _normalize(name)
            settings.values.pop(key, None)  # an earlier value of the key must not pass for the wanted one
            settings.problems.append(Problem(f"{COMMAND_LINE}: {error}", (key,) if key in get_leaves() else ()))
        else:
            settings.values[key] = Setting(value, COMMAND_LINE)
    return settings


def _split(argv: Sequence[str], problems: list[Problem]) -> list[tuple[str, list[str]]]:
    """Options as (name as written, words of its value)."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            message = f'{COMMAND_LINE}: "{word}" stands alone. Settings are written --section.key value;'
            problems.append(Problem(f"{message} a TOML file is named with --job.config_file FILE."))
    return options


def _normalize(name: str) -> str:
    return name.replace("-", "_")


def _read_option(name: str, words: list[str]) -> tuple[str, Any]:
    key = _normalize(name)
    leaf = get_leaves().get(key)
    if leaf is None:
        section, _, last = key.rpartition(".")
        negated = f"{section}.{last.removeprefix('no_')}"
        if last.startswith("no_") and negated in get_leaves() and get_leaves()[negated].type is bool:
            if words:
                raise ConversionError(f"--{name} takes no value, got {' '.join(words)}. Write --{negated} {words[0]}.")
            return negated, False
        if key in get_sections():
            example = next(k for k in get_leaves() if k.startswith(key + "."))
            raise ConversionError(f"--{name} is a section. Name one of its settings, such as --{example}.")
        raise ConversionError(f"unknown setting --{name}.{explain_unknown_key(key)}")
    try:
        return key, convert(parse_words(words, leaf.type), leaf.type)
    except ConversionError as error:
        raise ConversionError(f"--{name}: {error}", error.path) from None


def parse_words(words: list[str], annotation: Any) -> Any:
    """Words of the command line as the plain value that a TOML file would have held.

    A word that does not read as its type is returned as it is, for `convert` to complain about.

    Raises:
        ConversionError: no value or too many, or a list or table that does not parse.
    """
    if is_optional(annotation):
        (inner,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
        return None if [w.lower() for w in words] == ["none"] else parse_words(words, inner)
    if typing.get_origin(annotation) is list:
        return _parse_list(words, typing.get_args(annotation)[0])
    if annotation is bool and not words:
        return True
    if len(words) != 1:
        found = f"got {len(words)}: {' '.join(words)}" if words else "got none"
        raise ConversionError(f"expected one value, {found}.")
    return _parse_word(words[0], annotation)


def _parse_word(word: str, annotation: Any) -> Any:
    if annotation is bool:
        return _WORDS_FOR_BOOL.get(word.lower(), word)
    if annotation in (int, float):
        for number in (int, float):
            try:
                return number(word)
            except ValueError:
                pass
    return word


def _parse_list(words: list[str], item: Any) -> list[Any]:
    if is_section(item):
        return [table for word in words for table in _as_list(_parse_literal(word))]
    if typing.get_origin(item) is list:
        return _as_list(_parse_literal(" ".join(words))) if words else []
    if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
        return _as_list(_parse_literal(words[0]))
    parts = [part.strip() for word in words for part in word.split(",")]
    scalar = str if typing.get_origin(item) is Literal else item
    return [_parse_word(part, scalar) for part in parts if part]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parse_literal(text: str) -> Any:
    """A value in TOML (`[{dataset = "c4"}]`) or JSON (`[{"dataset": "c4"}]`) syntax."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        document = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError as error:
        raise ConversionError(f"{text} is neither a TOML nor a JSON value ({error}).") from None
    if document.keys() != {"value"}:
        raise ConversionError(f"{text} is not one TOML value.")
    return document["value"]
