"""Settings that somebody typed for a part of the program that is switched off: they do nothing, which is seldom what was meant.

Only the command line counts. A file has settings for many cases, and one that switches a part off need not drop the rest of its section.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from trainer.config.errors import Problem
from trainer.config.fields import get_leaves, get_value, show
from trainer.config.schema import JobConfig


class Switch(NamedTuple):
    """A setting, when it leaves others without effect, and which."""

    key: str
    is_off: Callable[[JobConfig], bool]
    others: tuple[str, ...]
    """Globs of keys."""


SWITCHES: tuple[Switch, ...] = (
    Switch("checkpoint.enable", lambda config: not config.checkpoint.enable, ("checkpoint.*",)),
    Switch("validation.enable", lambda config: not config.validation.enable, ("validation.*",)),
    Switch("compile.enable", lambda config: not config.compile.enable, ("compile.*",)),
    Switch(
        "profiling.enable_profiling",
        lambda config: not (config.profiling.enable_profiling or config.profiling.enable_memory_snapshot),
        ("profiling.*",),
    ),
    Switch("optimizer.name", lambda config: config.optimizer.name in ("AdamW", "Adam"), ("optimizer.muon.*",)),
    Switch(
        "activation_checkpoint.mode",
        lambda config: config.activation_checkpoint.mode != "selective",
        ("activation_checkpoint.selective_ac_option", "activation_checkpoint.per_op_*"),
    ),
    Switch(
        "activation_checkpoint.mode",
        lambda config: config.activation_checkpoint.mode != "memory_budget",
        ("activation_checkpoint.memory_budget",),
    ),
)


def find_switched_off(config: JobConfig, typed: Iterable[str]) -> Iterator[Problem]:
    """Yield what is typed in vain. typed: keys that the command line sets."""
    typed = tuple(typed)
    for switch in SWITCHES:
        if not switch.is_off(config):
            continue
        for key in (key for glob in switch.others for key in fnmatch.filter(typed, glob)):
            value = get_value(config, key)
            if key != switch.key and value != get_leaves()[key].default:
                message = f"{key} = {show(value)} has no effect: {switch.key} = {show(get_value(config, switch.key))}."
                yield Problem(message, (key, switch.key))
