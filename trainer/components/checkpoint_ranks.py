"""Ranks that save or load together: what one of them runs into is raised on all."""

import datetime
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trainer.config.errors import UserError


class Ranks:
    """This process among those of the run, with a gloo group for small messages. Works without a process group too."""

    def __init__(self, timeout_seconds: float) -> None:
        """Collective. timeout_seconds: how long a rank waits for the others before it gives up."""
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1
        self.group = self.new_group()

    def new_group(self) -> dist.ProcessGroup | None:
        """Return a new gloo group of all ranks, or None where there is no process group at all. Collective."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        return dist.new_group(backend="gloo", timeout=self._timeout)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, task: str, work: Callable[[], Any] | None = None) -> list[Any]:
        """Run `work` on every rank (those that pass None have none) and return the result of each rank.

        Raises:
            UserError, ValueError: some rank raised one. The message is that rank's.
            RuntimeError: some rank raised anything else; "could not <task>", and what went wrong where.
        """
        cause: BaseException | None = None
        result = None
        try:
            result = work() if work is not None else None
        # CheckpointException is not an Exception; interrupts and exits must pass.
        except (Exception, CheckpointException) as error:
            cause = error
        problem = None if cause is None else (_find_kind(cause), describe_error(cause))
        reports = self.all_gather((result, problem))
        problems = {rank: report[1] for rank, report in enumerate(reports) if report[1] is not None}
        if not problems:
            return [report[0] for report in reports]
        for kind, text in problems.values():
            if kind is not None:
                raise kind(text) from cause
        texts = dict.fromkeys(text for _, text in problems.values())
        raise RuntimeError(f"could not {task}: rank {min(problems)}: {'; '.join(list(texts)[:3])}") from cause


def _find_kind(error: BaseException) -> type[ValueError] | None:
    """Return what an error is raised as on all ranks: its message alone, or, with None, in words about the task."""
    return next((kind for kind in (UserError, ValueError) if isinstance(error, kind)), None)


def describe_error(error: BaseException) -> str:
    """Return an error in one line. Of DCP's collection of tracebacks, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        return f"on rank {rank}, {describe_error(error.failures[rank][0])}"
    if isinstance(error, ValueError):
        return str(error)
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
