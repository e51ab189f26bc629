"""The resolved configuration as TOML text, from which the run can be started again."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.fields import Leaf, get_leaves, get_value
from trainer.config.manager import DEFAULT, LoadedConfig
from trainer.config.schema import JobConfig

# A file cannot name itself: what it was loaded from is in the comments of the other values.
_LEFT_OUT = frozenset({"job.config_file"})


def format_config(loaded: LoadedConfig) -> str:
    """TOML text of all settings; a comment tells the origin of each that was set in a file or on the command line."""
    return _render(loaded.config, loaded.origins)


def write_config(config: JobConfig, path: str | Path, *, origins: Mapping[str, str] | None = None) -> None:
    """Writes all settings to a TOML file, whole or not at all. Loading it gives `config`, except `job.config_file`.

    Args:
        path: the file; its folder is made. An existing file is replaced.
        origins: as in `LoadedConfig`, to be noted in comments.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(_render(config, origins or {}), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _render(config: JobConfig, origins: Mapping[str, str]) -> str:
    lines: list[str] = []
    section = None
    for leaf in get_leaves().values():
        text = _format_setting(get_value(config, leaf.key), leaf)
        if text is None or leaf.key in _LEFT_OUT:
            continue
        prefix, _, name = leaf.key.rpartition(".")
        if prefix != section:
            lines += ["", f"[{prefix}]"] if lines else [f"[{prefix}]"]
            section = prefix
        origin = origins.get(leaf.key, DEFAULT)
        comment = "" if origin == DEFAULT else f"  # {_on_one_line(origin)}"
        lines.append(f"{name} = {text}{comment}")
    return "\n".join(lines) + "\n"


def _format_setting(value: Any, leaf: Leaf) -> str | None:
    """Text of a value, or None where the line is left out because its absence says the same."""
    if value is None:
        return None if leaf.default is None else format_value("none")
    return format_value(value)


def format_value(value: Any) -> str:
    """A value of the schema in TOML syntax, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    assert dataclasses.is_dataclass(value), f"no TOML syntax for {value!r}"
    pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return "{" + ", ".join(f"{name} = {format_value(item)}" for name, item in pairs if item is not None) + "}"


def _on_one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
