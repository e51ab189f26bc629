"""From the command line to a `JobConfig`: default < TOML file < command line, with the origin of every value."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.config.cli import COMMAND_LINE, read_arguments
from trainer.config.errors import Problem
from trainer.config.fields import build_config, get_leaves, show
from trainer.config.help_text import print_help
from trainer.config.schema import JobConfig
from trainer.config.schema_quantize import FLOAT8_CONVERTERS, OPT_LEVELS
from trainer.config.toml_file import Setting, Settings, read_toml

DEFAULT = "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, where each value of it came from, and what was wrong with the sources."""

    config: JobConfig
    origins: dict[str, str]
    """Dotted key to `default`, `file:line` or `command line`, for every setting."""
    problems: list[Problem] = field(default_factory=list)
    """What was wrong with file and command line. A setting in question has its default in `config`."""

    warnings: list[Problem] = field(default_factory=list)
    """What was read, but not quite as written."""

    @property
    def broken_keys(self) -> frozenset[str]:
        """Settings whose given value could not be read."""
        return frozenset(key for problem in self.problems for key in problem.keys)


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Reads command line (without the program's name) and TOML file. `-h` or `--help` prints the help and exits.

    Nothing is raised for what the user got wrong: `trainer.preflight.check` raises it, together with everything that
    is wrong with the values, as one `ConfigError`.

    Raises:
        SystemExit: with code 0, after the help.
    """
    if "-h" in argv or "--help" in argv:
        print_help()
        raise SystemExit(0)
    arguments = read_arguments(argv)
    settings = Settings()
    config_file = arguments.values.get("job.config_file")
    if config_file is not None and config_file.value is not None:
        settings = read_toml(config_file.value)
    settings.update(arguments)
    warnings = _follow_deprecated_tokenizer_path(settings)
    _follow_opt_level(settings)
    _follow_model_prefix(settings)
    origins = {key: settings.values[key].origin if key in settings.values else DEFAULT for key in get_leaves()}
    config = build_config({key: setting.value for key, setting in settings.values.items()})
    return LoadedConfig(config=config, origins=origins, problems=settings.problems, warnings=warnings)


def _follow_deprecated_tokenizer_path(settings: Settings) -> list[Problem]:
    """`model.tokenizer_path` stands for `model.hf_assets_path` where that is not given, so that one key counts later."""
    old, new = "model.tokenizer_path", "model.hf_assets_path"
    given = settings.values.get(old)
    if given is None or given.value is None:
        return []
    message = f"{old} = {given.value} is deprecated: write {new}."
    if settings.values.setdefault(new, given).value != given.value:
        message = f"{old} = {given.value} is ignored: {new} = {settings.values[new].value} takes its place."
    return [Problem(message, (old,))]


def _follow_opt_level(settings: Settings) -> None:
    """`fp8_opt_level` stands for settings of other sections, which count later; another value of one of them is a problem."""
    key = "quantize.linear.float8.fp8_opt_level"
    level, converters = settings.values.get(key), settings.values.get("model.converters")
    if level is None or level.value is None or converters is None or FLOAT8_CONVERTERS.isdisjoint(converters.value):
        return
    for meant, value in OPT_LEVELS[level.value].items():
        given = settings.values.setdefault(meant, Setting(value, level.origin))
        if given.value != value:
            message = f"{key} = {level.value}: means {meant} = {value}, and {show(given.value)} is given. Leave one of them out."
            settings.problems.append(Problem(message, (key, meant)))


def _follow_model_prefix(settings: Settings) -> None:
    """`model.name = simple_fsdp.llama3`, as torchtitan spells it, stands for `llama3` with that implementation of data parallelism."""
    key, prefix = "model.name", "simple_fsdp."
    given = settings.values.get(key)
    if given is not None and isinstance(given.value, str) and given.value.startswith(prefix):
        settings.values[key] = dataclasses.replace(given, value=given.value.removeprefix(prefix))
        settings.values["parallelism.data_parallel_implementation"] = dataclasses.replace(given, value="simple_fsdp")


__all__ = ["COMMAND_LINE", "DEFAULT", "LoadedConfig", "load_config"]
