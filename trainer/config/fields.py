"""The schema as a flat table: every setting under its dotted key, and the way back from values to a `JobConfig`."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.schema import JobConfig


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted key, its annotated type, and its default."""

    key: str
    type: Any
    default: Any


def get_type_hints(cls: type) -> dict[str, Any]:
    """Annotations of a section, resolved. Cached, since every value asks for them."""
    return _cached_hints(cls)


@functools.cache
def _cached_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def get_default(field: dataclasses.Field) -> Any:
    """Default of a dataclass field, made anew where it is a factory."""
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING, f"config field {field.name} has no default"
    return field.default_factory()


def is_section(annotation: Any) -> bool:
    """Whether an annotation names a section (a dataclass), and not a value."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def get_item_section(annotation: Any) -> type | None:
    """The section class of a list of sections (`list[SourceConfig]`), else None."""
    if typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        return item if is_section(item) else None
    return None


@functools.cache
def get_leaves() -> Mapping[str, Leaf]:
    """All settings in the order of the schema, by dotted key."""
    leaves: dict[str, Leaf] = {}

    def walk(cls: type, prefix: str) -> None:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            key = prefix + field.name
            if is_section(hints[field.name]):
                walk(hints[field.name], key + ".")
            else:
                leaves[key] = Leaf(key, hints[field.name], get_default(field))

    walk(JobConfig, "")
    return leaves


@functools.cache
def get_sections() -> frozenset[str]:
    """Dotted names of all sections, nested ones too."""
    names: set[str] = set()
    for key in get_leaves():
        parts = key.split(".")[:-1]
        names.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return frozenset(names)


def get_value(config: JobConfig, key: str) -> Any:
    """Value of a setting by its dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def build_config(values: Mapping[str, Any]) -> JobConfig:
    """`JobConfig` with `values` (dotted key to converted value) in place of the defaults."""
    unknown = values.keys() - get_leaves().keys()
    assert not unknown, f"not settings: {sorted(unknown)}"

    def make(cls: type, prefix: str) -> Any:
        hints = get_type_hints(cls)
        arguments = {}
        for field in dataclasses.fields(cls):
            key = prefix + field.name
            if is_section(hints[field.name]):
                arguments[field.name] = make(hints[field.name], key + ".")
            elif key in values:
                arguments[field.name] = values[key]
        return cls(**arguments)

    return make(JobConfig, "")


def show(value: object) -> str:
    """A value as a message has it: as on the command line, a long list cut short."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


_SHOWN_CHARACTERS = 80


def format_choices(choices: Iterable[object]) -> str:
    """`a, b or c`, for messages."""
    names = [str(choice) for choice in choices]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """` Did you mean X?` with the nearest of `known`, or the empty string when nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f" Did you mean {by_lower[near[0]]}?" if near else ""


# Names that older torchtitan releases gave to settings.
_FORMER_NAMES = {
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "validation.enabled": "validation.enable",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "job.print_args": "job.print_config",
    "metrics.enable_color_printing": "metrics.disable_color_printing",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
}


def explain_unknown_key(key: str) -> str:
    """What to say about a dotted key that is no setting: its new name, the nearest one, or the settings beside it."""
    if key in _FORMER_NAMES:
        return f" It is called {_FORMER_NAMES[key]} now."
    if key.startswith("float8."):
        return f" It is called quantize.linear.{key} now."
    section, _, name = key.rpartition(".")
    if section in get_sections():
        siblings = [k for k in get_leaves() if k.rpartition(".")[0] == section]
        near = suggest(name, (k.rpartition(".")[2] for k in siblings))
        if near:
            return near.replace("Did you mean ", f"Did you mean {section}.")
    elsewhere = [k for k in get_leaves() if k.rpartition(".")[2] == name]
    near = suggest(key, get_leaves(), cutoff=0.85)
    if elsewhere and not near:
        return f" Did you mean {format_choices(elsewhere)}?"
    return near or suggest(key, get_leaves())


def explain_unknown_section(name: str) -> str:
    """What to say about a table that is no section."""
    if name == "float8":
        return " It is called quantize.linear.float8 now."
    return suggest(name, get_sections())
