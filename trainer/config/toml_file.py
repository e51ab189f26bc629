"""Settings from a TOML file and from the files that it extends."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli

from trainer.config.convert import ConversionError, convert, describe_value
from trainer.config.errors import Problem
from trainer.config.fields import explain_unknown_key, explain_unknown_section, get_leaves, get_sections
from trainer.config.toml_lines import KeyPath, locate_keys

EXTENDS = "extends"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A converted value and where it was set: `file:line` or `command line`."""

    value: Any
    origin: str


@dataclasses.dataclass
class Settings:
    """What a source of settings gave: values by dotted key, and what was wrong with it."""

    values: dict[str, Setting] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def update(self, stronger: "Settings") -> None:
        """Takes over the values of a source with precedence over this one. Problems add up."""
        self.values.update(stronger.values)
        self.problems.extend(stronger.problems)


def read_toml(path: str | Path) -> Settings:
    """Settings of a TOML file, over those of the file that its key `extends` names, to any depth.

    `extends` is a path relative to the file that it stands in. Values are converted to the types of the schema. What
    is wrong (no such file, syntax, unknown keys, types, a circle of files) is collected, never raised.
    """
    return _read_chain(Path(path).expanduser(), chain=(), set_by=f"job.config_file = {path}")


def _read_chain(path: Path, *, chain: tuple[Path, ...], set_by: str) -> Settings:
    settings = Settings()
    identity = path.resolve()
    if identity in (seen.resolve() for seen in chain):
        circle = " -> ".join(str(p) for p in (*chain, path))
        settings.problems.append(Problem(f"{set_by}: the files extend each other in a circle: {circle}."))
        return settings
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomli.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        settings.problems.append(Problem(f"{set_by}: cannot read the file ({reason})."))
    except UnicodeDecodeError as error:
        settings.problems.append(Problem(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8."))
    except tomli.TOMLDecodeError as error:
        settings.problems.append(Problem(_explain_syntax(path, text, error)))
    else:
        reader = _Reader(path, locate_keys(text))
        if EXTENDS in table:
            settings.update(_read_base(table.pop(EXTENDS), path=path, chain=chain, origin=reader.origin((EXTENDS,))))
        settings.update(reader.read(table))
    return settings


def _read_base(base: Any, *, path: Path, chain: tuple[Path, ...], origin: str) -> Settings:
    if not isinstance(base, str):
        message = f"{origin}: {EXTENDS} expects the path of one TOML file, got {describe_value(base)}."
        return Settings(problems=[Problem(message)])
    base_path = path.parent / Path(base).expanduser()
    return _read_chain(base_path, chain=(*chain, path), set_by=f"{origin}: {EXTENDS} = {base_path}")


def _explain_syntax(path: Path, text: str, error: tomli.TOMLDecodeError) -> str:
    line = getattr(error, "lineno", None)  # since tomli 2.2
    message = getattr(error, "msg", str(error))
    if line is None:
        return f"{path}: not valid TOML: {error}"
    lines = text.splitlines()
    found = f" in: {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
    return f"{path}:{line}: not valid TOML: {message}{found}"


class _Reader:
    """Turns the tables of one file into settings by dotted key."""

    def __init__(self, path: Path, lines: dict[KeyPath, int]) -> None:
        self.path = path
        self.lines = lines

    def origin(self, path: KeyPath) -> str:
        """`file:line` of a key, or of the nearest thing around it that has a line."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.path}:{self.lines[path]}" if path else str(self.path)

    def read(self, table: dict[str, Any]) -> Settings:
        settings = Settings()
        for parts, value in self.walk(table, ()):
            key = ".".join(parts)
            if key not in get_leaves():
                settings.problems.append(self.explain_unknown(parts, value))
                continue
            try:
                converted = convert(value, get_leaves()[key].type)
            except ConversionError as error:
                origin = self.origin((*parts, *error.path))
                settings.problems.append(Problem(f"{origin}: {key}: {error}", (key,)))
            else:
                settings.values[key] = Setting(converted, self.origin(parts))
        if "job.config_file" in settings.values:
            origin = settings.values.pop("job.config_file").origin
            message = f"{origin}: job.config_file only works on the command line. To build on a file, write"
            settings.problems.append(Problem(f'{message} {EXTENDS} = "FILE" at the top.', ("job.config_file",)))
        return settings

    def walk(self, table: dict[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Every value under the known sections, and the first unknown thing on each way down."""
        for name, value in table.items():
            parts = (*prefix, name)
            if ".".join(parts) in get_sections() and isinstance(value, dict):
                yield from self.walk(value, parts)
            else:
                yield parts, value

    def explain_unknown(self, parts: tuple[str, ...], value: Any) -> Problem:
        key = ".".join(parts)
        origin = self.origin(parts)
        if key in get_sections():
            return Problem(f"{origin}: {key} is a section: expected the table [{key}], got {describe_value(value)}.")
        if parts[-1] == EXTENDS:
            return Problem(f"{origin}: {EXTENDS} must stand at the top of the file, before the first [section].")
        if isinstance(value, dict):
            return Problem(f"{origin}: unknown section [{key}].{explain_unknown_section(key)}")
        return Problem(f"{origin}: unknown key {key}.{explain_unknown_key(key)}")
