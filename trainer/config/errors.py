"""What mistakes of the user raise: a wrong configuration, and what shows only once a run has begun."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (or, as a warning, worth knowing) about the configuration."""

    message: str
    """Sentence for the user: the dotted key, its value, what is allowed, and the way out."""
    keys: tuple[str, ...] = ()
    """Dotted keys whose values brought it about, so that the report can say where each was set."""

    def __str__(self) -> str:
        return self.message


class RunError(Exception):
    """Ends a run by its message alone, which says what to change: it tells of no bug, so that nobody needs its traceback."""


class UserError(RunError, ValueError):
    """A mistake of the user's that shows only when a run looks closer: at data, files, folders, hosts."""


class ResourceError(RunError, RuntimeError):
    """A disk, a network or a source of data failed, and goes on failing."""


class ConfigError(ValueError):
    """The configuration cannot be run. `problems` lists everything that was found, one sentence each."""

    def __init__(self, problems: Iterable[object]) -> None:
        self.problems: list[str] = [str(problem) for problem in problems]
        super().__init__(self._report())

    def _report(self) -> str:
        count = len(self.problems)
        title = "1 problem in the configuration:" if count == 1 else f"{count} problems in the configuration:"
        return "\n".join([title, *(f"  - {problem}" for problem in self.problems)])
