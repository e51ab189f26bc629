"""Batches made ahead of the training loop, in threads."""

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch

logger = logging.getLogger(__name__)

DEFAULT_PREFETCH_FACTOR = 4
_POLL_SECONDS = 0.2
_JOIN_SECONDS = 10.0

T = TypeVar("T")


class WaitClock:
    """Adds up the time that the training loop waits for data."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Get the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Prefetcher:
    """Calls `produce(0)`, `produce(1)`, ... ahead of use, and hands out the results in that order.

    What is handed out depends on neither the number of threads nor their timing. An error in `produce` is raised by the
    `get` of that number. Calls are short and their number is bounded, so the end of the process waits for none for long.

    Args:
        produce: makes the batch of a number; called from several threads at once.
        workers: threads.
        depth: batches that are ready or being made, at most.
        count: calls in all; None for no end.
        device_index: CUDA device to make current in the threads, so that pinned memory belongs to its context.
    """

    def __init__(
        self,
        produce: Callable[[int], dict[str, torch.Tensor]],
        *,
        workers: int,
        depth: int,
        count: int | None = None,
        device_index: int | None = None,
    ) -> None:
        self._produce = produce
        self._depth = max(depth, 1)
        self._count = count
        self._next = 0
        self._futures: deque[Future[dict[str, torch.Tensor]]] = deque()
        self._executor = ThreadPoolExecutor(
            max_workers=workers,
            thread_name_prefix="data",
            initializer=functools.partial(_set_device, device_index),
        )
        self._fill()

    def get(self) -> dict[str, torch.Tensor]:
        """Wait for the next batch. There must be one: no more than `count` calls."""
        assert self._futures, "all batches were handed out"
        batch = self._futures.popleft().result()
        self._fill()
        return batch

    def close(self) -> None:
        """Cancel what was not begun and wait for the threads to end."""
        self._futures.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._futures) < self._depth and (self._count is None or self._next < self._count):
            self._futures.append(self._executor.submit(self._produce, self._next))
            self._next += 1


class BackgroundIterator(Generic[T]):
    """Runs an iterator in one thread, up to `depth` items ahead. Its error is raised once the items before it are out.

    The thread is a daemon: one that hangs in a read does not keep the process from ending.

    Args:
        make: makes the iterator, in the thread; it should end soon after the event it is given is set.
        depth: items ready ahead.
        device_index: CUDA device to make current in the thread.
    """

    def __init__(
        self, make: Callable[[threading.Event], Iterator[T]], *, depth: int, device_index: int | None = None
    ) -> None:
        self._make = make
        self._device_index = device_index
        self._stop = threading.Event()
        self._items: queue.Queue[T | _End] = queue.Queue(maxsize=max(depth, 1))
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._run, name="data-stream", daemon=True)
        self._thread.start()

    def get(self, timeout: float | None = None) -> T | None:
        """Wait for the next item; None when there is none left. timeout: in seconds; None waits as long as it takes.

        Raises:
            queue.Empty: there was none in that time.
            whatever the iterator raised, at every call from then on.
        """
        if self._end is None:
            item = self._items.get(timeout=timeout)
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        return None

    def close(self) -> None:
        """Stop the thread and wait for it, for some seconds at most."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._items.get_nowait()
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("the thread that reads the stream is stuck in a read and is left behind")

    def _run(self) -> None:
        end = _End(None)
        try:
            _set_device(self._device_index)
            for item in self._make(self._stop):
                if not self._put(item):
                    return
        except BaseException as error:  # raised in the training loop instead
            end = _End(error)
        self._put(end)

    def _put(self, item: "T | _End") -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=_POLL_SECONDS)
                return True
        return False


class _End:
    """Comes after the last item of a BackgroundIterator."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _set_device(device_index: int | None) -> None:
    if device_index is not None:
        torch.cuda.set_device(device_index)


def to_tensors(arrays: dict[str, np.ndarray], *, pin: bool) -> dict[str, torch.Tensor]:
    """Wrap arrays as tensors, copied to pinned memory on request."""
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


def get_pin_device(*, pin_memory: bool, device_type: str) -> int | None:
    """Get the CUDA device for which batches are pinned, or None where they are not."""
    if pin_memory and device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.current_device()
    return None
