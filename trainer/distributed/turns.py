"""Two passes of a model at once, by turns: while one waits for an exchange, the other computes.

A device works through what it is given in order, so that a pass which waits for its rows leaves it idle. Here the passes run in a
thread each, and exactly one of them at a time, so that every rank gives work and collectives to its device in the same order;
at the places where a pass would wait, it lets the other go on (as DualPipe overlaps, DeepSeek-V3, arXiv 2412.19437, section
3.2.1).
"""

import threading
from collections.abc import Callable

import torch


class Turns:
    """Whose turn it is, of a forward pass and a backward pass. One object can be used again and again."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: set[int] = set()
        """The passes that are not done: 0, the one of the thread that called `run`, and 1."""
        self._turn = 0
        self._first_thread = 0

    def run(self, first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
        """Run both, `first` in this thread, and return when both are done.

        Raises:
            Exception: what one of them raised, that of `first` if both did. The other one is run to its end before.
        """
        assert not self._running, "two passes at once, not more"
        self._running, self._turn, self._first_thread = {0, 1}, 0, threading.get_ident()
        failures: list[BaseException] = []

        def run_second() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            try:
                self._wait_for_turn(1)
                second()
            except BaseException as error:  # raised below, in the thread that waits for it
                failures.append(error)
            finally:
                self._finish(1)

        thread = threading.Thread(target=run_second, name="backward-beside-forward")
        thread.start()
        try:
            first()
        finally:
            self._finish(0)
            thread.join()
        if failures:
            raise failures[0]

    def pass_on(self) -> None:
        """Let the other pass go on, until it passes the turn back or is done. Does nothing where there is none.

        The passes call it, wherever they are about to wait. That of the backward pass may be in a thread of the autograd engine.
        """
        if len(self._running) < 2:
            return
        me = 0 if threading.get_ident() == self._first_thread else 1
        with self._condition:
            self._turn = 1 - me
            self._condition.notify_all()
        self._wait_for_turn(me)

    def _wait_for_turn(self, me: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._turn == me or 1 - me not in self._running)

    def _finish(self, me: int) -> None:
        with self._condition:
            self._running.discard(me)
            self._turn = 1 - me
            self._condition.notify_all()


TURNS = Turns()
"""The two passes of this process. There is one device, which they share."""
