"""SIGTERM and SIGUSR1, which ask a run to stop. The one place that decides what they do.

A launcher sends SIGTERM for two reasons: the run is to stop (a time limit, preemption, an operator), or another process
has died and the survivors are to go. Handlers here only note the first: the training loop asks (`requested`), agrees
with the other ranks and ends in good order. The second is for the watchdog, whose thread is woken by the same signal
(`watchdog_host.Bell`): it ends the process at once where it knows of a death. SLURM sends signals to each process, and
torchrun sends them again: a signal that has come counts once. Imports no torch.
"""

import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequestedError(BaseException):
    """A stop signal came before the training loop could ask for it. No `Exception`: nothing on the way swallows it."""


class StopSignals(AbstractContextManager):
    """Handles the stop signals inside a `with` statement on the main thread; on another thread, nothing.

    Until `is_polled` is set, while there is nothing to save and nobody to agree with, the first signal raises
    `StopRequestedError` on the main thread.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal that came. Empty: none."""
        self.is_polled = False
        """Whether the program asks for `requested`, so that a signal need not interrupt it."""
        self._pid = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_installed(self) -> bool:
        """Whether signals of this process come here."""
        return self._pid == os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            os.register_at_fork(after_in_child=self._let_go)
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.requested
        self.requested = self.requested or signal.Signals(number).name
        if is_first and not self.is_polled:
            raise StopRequestedError(self.requested)

    def _let_go(self) -> None:
        """Put back what was there before: at the end, and in a child, which a signal shall end."""
        before, self._before, self._pid = self._before, {}, 0
        for number, handler in before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
