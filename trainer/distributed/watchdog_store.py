"""The watchdog's way to the store: a connection and a thread of its own, never waited for in vain."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from trainer.distributed.watchdog_report import Report

Result = TypeVar("Result")

_CHUNK = 512  # reports in one request: some 100 KB of answers


class NoAnswerError(RuntimeError):
    """The store did not answer in time, or its host closed the connection."""


class StoreLine:
    """A store that is asked with a deadline.

    PyTorch's client waits for ever when the store's host vanishes without a word, hence the thread. After an error of
    the network the store is not asked again: each try would write a page of C++ frames to the terminal.
    """

    def __init__(self, store: dist.Store, *, timeout: float) -> None:
        self._timeout = timeout
        # A connection of its own: a client that waits in one thread holds up another.
        clone = store.clone()  # type: ignore[attr-defined]
        clone.set_timeout(timedelta(seconds=timeout))
        self._store = dist.PrefixStore("watchdog", clone)
        self._requests: queue.SimpleQueue[tuple[Future, Callable[[dist.Store], object]] | None] = queue.SimpleQueue()
        self._is_gone = False
        self._thread = threading.Thread(target=self._serve, name="watchdog-store", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (item := self._requests.get()) is not None:
            future, request = item
            if not future.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            try:
                future.set_result(request(self._store))
            except Exception as error:  # it is raised where the answer is waited for
                future.set_exception(error)

    def ask(self, request: Callable[[dist.Store], Result], timeout: float | None = None) -> Result:
        """Return what `request` gets from the store.

        Raises:
            NoAnswerError: no answer within `timeout` seconds, or the store's host is gone.
        """
        if self._is_gone:
            raise NoAnswerError("the store's host is gone")
        future: Future[Result] = Future()
        self._requests.put((future, request))
        try:
            return future.result(self._timeout if timeout is None else timeout)
        except TimeoutError as error:
            future.cancel()
            raise NoAnswerError("the store does not answer") from error
        except RuntimeError as error:  # of the network, or of the store
            self._is_gone = True
            raise NoAnswerError(str(error)) from error

    def has(self, key: str) -> bool:
        """Return whether a key has a value."""
        return self.ask(lambda store: store.check([key]))

    def set(self, key: str, value: str) -> None:
        """Give a key a value."""
        self.ask(lambda store: store.set(key, value))

    def get(self, key: str) -> bytes | None:
        """Return a key's value; None without one."""
        return self.ask(lambda store: store.get(key) if store.check([key]) else None)

    def claim(self, key: str) -> bool:
        """Return whether this is the first to claim a key, over all processes."""
        return self.ask(lambda store: store.add(key, 1)) == 1

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; return what it is then."""
        return self.ask(lambda store: store.add(key, amount))

    def post(self, report: Report, timeout: float | None = None) -> None:
        """Put a rank's report where the others read it. They do, even if this process ends as soon as this returns."""

        def request(store: dist.Store) -> bool:
            store.set(str(report.rank), report.encode())
            return not report.end or store.check([str(report.rank)])  # the server answers in order

        self.ask(request, timeout)

    def read_reports(self, ranks: Iterable[int]) -> dict[int, Report]:
        """Return the last reports of these ranks, of those that ever gave one."""
        wanted = list(ranks)
        reports: dict[int, Report] = {}
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            reports |= self.ask(lambda store, chunk=chunk: _read_chunk(store, chunk))  # type: ignore[misc]
        return reports

    def close(self) -> None:
        """End the thread. One that waits for a dead store is left behind, and does not keep the process alive."""
        self._requests.put(None)
        self._thread.join(1.0)


def _read_chunk(store: dist.Store, ranks: list[int]) -> dict[int, Report]:
    # Asking for a missing key would wait for it.
    if not store.check([str(rank) for rank in ranks]):
        ranks = [rank for rank in ranks if store.check([str(rank)])]
    keys = [str(rank) for rank in ranks]
    is_extended = store.has_extended_api()  # type: ignore[attr-defined]
    values = store.multi_get(keys) if is_extended else [store.get(key) for key in keys]
    return {rank: Report.decode(value) for rank, value in zip(ranks, values, strict=True)}


def wait_until(condition: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Wait until a condition holds; return whether it does within that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True
