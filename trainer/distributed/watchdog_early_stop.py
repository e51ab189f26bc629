"""A stop signal before training begins: one rank tells the others, through the store. They cannot agree yet, and have nothing to save."""

import contextlib

from trainer.distributed.stop_signals import StopSignals
from trainer.distributed.watchdog_host import Bell
from trainer.distributed.watchdog_store import NoAnswerError, StoreLine

_KEY = "stop"


class EarlyStop:
    """What one rank knows of such a signal. signals: None if the program does not handle any; then there is no early stop."""

    def __init__(self, line: StoreLine, bell: Bell, signals: StopSignals | None) -> None:
        self._line = line
        self._bell = bell
        self._signals = signals

    def tell(self, name: str) -> None:
        """Tell all ranks of a signal."""
        with contextlib.suppress(NoAnswerError):
            self._line.set(_KEY, name)

    def is_due(self) -> bool:
        """Return whether this rank or another got a signal; tell all of one of this rank's, and `signals` of another's."""
        signals = self._signals
        if signals is None or not signals.is_installed:
            return False
        try:
            told = self._line.get(_KEY)
        except NoAnswerError:
            return False
        # Once the training loop asks for signals, all agree on one of this rank's. The main thread may be in C code, and not know yet.
        own = "" if signals.is_polled else signals.requested or self._bell.asked_by
        if told is None and own:
            self.tell(own)
        signals.requested = signals.requested or (own if told is None else told.decode())
        return told is not None or bool(own)
