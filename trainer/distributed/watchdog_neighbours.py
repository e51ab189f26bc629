"""What a watchdog knows of the other processes of its host, whose death can be seen at once."""

import contextlib
import dataclasses

from trainer.distributed.watchdog_host import get_process_state
from trainer.distributed.watchdog_report import Report
from trainer.distributed.watchdog_store import NoAnswerError, StoreLine


class Neighbours:
    """The other ranks of a host, which follow each other, as far as they have been met."""

    def __init__(self, line: StoreLine, *, rank: int, world_size: int, host: str, namespace: int) -> None:
        """rank, host, namespace: of this process, as in `Report`"""
        self.first: Report | None = None
        """Of rank 0, on whatever host."""
        self.is_second_host = False
        """Whether this host's ranks come right after those of rank 0's host."""
        self._line = line
        self._rank = rank
        self._world_size = world_size
        self._place = (host, namespace)
        self._reports: dict[int, Report] = {}
        self._has_met_all = False

    @property
    def ranks(self) -> list[int]:
        """Those that have been met."""
        return list(self._reports)

    def meet(self) -> None:
        """Get to know them, once they have started.

        Raises:
            NoAnswerError: the store does not answer.
        """
        if self._has_met_all:
            return
        self.first = self._read(0)
        for step in (-1, 1):
            rank = self._rank + step
            while 0 <= rank < self._world_size:
                report = self._read(rank)
                if report is None or self.first is None:
                    return  # look again at the next heartbeat
                if (report.host, report.namespace) != self._place:
                    self.is_second_host |= step == -1 and report.host == self.first.host
                    break
                self._reports[rank] = report
                rank += step
        self._has_met_all = True

    def _read(self, rank: int) -> Report | None:
        return self._line.read_reports([rank]).get(rank)

    def find_dead(self) -> list[int]:
        """Return the ranks whose process is gone and did not say that it goes, or failed."""
        gone = [rank for rank, state in self.get_states().items() if state == "gone"]
        with contextlib.suppress(NoAnswerError):
            for rank in gone:
                if not self._reports[rank].end:
                    self._reports[rank] = self._read(rank) or self._reports[rank]
        ends = {rank: self._reports[rank].end for rank in gone}
        return [rank for rank, end in ends.items() if not end or end.startswith("failed")]

    def get_states(self) -> dict[int, str]:
        """Return what they do now, by rank: see `get_process_state`."""
        return {rank: get_process_state(report.pid) for rank, report in self._reports.items()}

    def add_states(self, report: Report) -> Report:
        """Return the report with what they do now."""
        states = self.get_states()
        gone = tuple(rank for rank, state in states.items() if state == "gone")
        stopped = tuple(rank for rank, state in states.items() if state == "stopped")
        return dataclasses.replace(report, gone=gone, stopped=stopped)
