"""SIGTERM and SIGUSR1, which ask a run to stop. The one place that decides what they do.

A launcher sends SIGTERM for two reasons: the run is to stop (a time limit, preemption, an operator), or another process
has died and the survivors are to go. Handlers here only note the first: the training loop asks (`requested`), agrees
with the other ranks and ends in good order. The second is for the watchdog, whose thread is woken by the same signal
(`watchdog_host.Bell`): it ends the process at once where it knows of a death. Before training begins there is nothing to
save, and ranks cannot agree yet: then the watchdog of the one that got the signal tells those of the others, and all end.
SLURM sends signals to each process, and torchrun sends them again: a signal that has come counts once. Imports no torch.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequestedError(BaseException):
    """A stop signal came while data were prepared. No `Exception`: nothing on the way swallows it."""


class StopSignals(AbstractContextManager):
    """Handles the stop signals inside a `with` statement on the main thread; on another thread, nothing."""

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal that came. Empty: none."""
        self.is_polled = False
        """Whether the training loop asks for `requested`, and agrees with the other ranks."""
        self._interrupts = False
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

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Have a signal raise `StopRequestedError` inside a `with` statement, one that has come before as well."""
        self._interrupts = True
        try:
            self._raise_if_requested()
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self.requested and self._interrupts:
            self._interrupts = False  # once
            raise StopRequestedError(self.requested)

    def _let_go(self) -> None:
        """Put back what was there before: at the end, and in a child, which a signal shall end."""
        before, self._before, self._pid = self._before, {}, 0
        for number, handler in before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
