"""Streams and events of a device that is not there: work in order on each, and waits between them, in simulated seconds.

FSDP2 runs its collectives on streams of its own. On a CPU torch gives it streams that do nothing; these take their place, so that
the program itself says what overlaps with what.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

COMPUTE = "compute"
HOST = "host"


class PlannedStream:
    """Work in order. `clock` is when the last of it will be done."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.clock = 0.0

    def wait_stream(self, stream: "PlannedStream") -> None:
        """Later work here begins after what `stream` has so far."""
        self.clock = max(self.clock, stream.clock)

    def record_event(self, event: "PlannedEvent | None" = None) -> "PlannedEvent":
        """Return an event that happens when the work so far is done."""
        event = event or PlannedEvent()
        event.clock = self.clock
        return event

    def wait_event(self, event: "PlannedEvent | None") -> None:
        """Later work here begins after the event."""
        if event is not None:
            self.clock = max(self.clock, event.clock)

    def synchronize(self) -> None:
        """The host never waits: it is taken to be ahead of the device."""


class PlannedEvent:
    """A moment on a stream."""

    def __init__(self, streams: "Streams | None" = None) -> None:
        self._streams = streams
        self.clock = 0.0

    def record(self, stream: PlannedStream | None = None) -> "PlannedEvent":
        """Note when the work so far is done, of the current stream unless another is given."""
        assert self._streams is not None or stream is not None, "an event that belongs to no device"
        of = stream if stream is not None else self._streams.current  # type: ignore[union-attr]
        self.clock = of.clock
        return self

    def wait(self, stream: PlannedStream | None = None) -> None:
        """Have a stream wait for this event."""
        of = stream if stream is not None else self._streams.current  # type: ignore[union-attr]
        of.clock = max(of.clock, self.clock)

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def synchronize(self) -> None:
        """The host never waits."""


class Streams:
    """All streams of the planned device, one of which is current."""

    # In the order in which FSDP2 makes them (FSDPCommContext.lazy_init, torch 2.11 to 2.13).
    _NAMES = ("gather copy-in", "gather", "reduce", "all-reduce")

    def __init__(self) -> None:
        self.compute = PlannedStream(COMPUTE)
        self.current = self.compute
        self.all = [self.compute]

    def make(self, *_: Any, **__: Any) -> PlannedStream:
        """Return a new stream, with a name."""
        round_, place = divmod(len(self.all) - 1, len(self._NAMES))
        stream = PlannedStream(self._NAMES[place] + (f" {round_ + 1}" if round_ else ""))
        self.all.append(stream)
        return stream

    def make_event(self, *_: Any, **__: Any) -> PlannedEvent:
        """Return a new event."""
        return PlannedEvent(self)

    def get_current(self, *_: Any) -> PlannedStream:
        """Return the current stream."""
        return self.current

    @contextlib.contextmanager
    def use(self, stream: PlannedStream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have torch.cpu, which stands for the planned device, give these streams to whoever asks."""
        with (
            mock.patch.object(torch.cpu, "Stream", self.make),
            mock.patch.object(torch.cpu, "Event", self.make_event),
            mock.patch.object(torch.cpu, "current_stream", self.get_current),
            mock.patch.object(torch.cpu, "stream", self.use),
            mock.patch.object(
                torch.accelerator, "current_stream", self.get_current
            ),  # for a gather that nobody waited for
        ):
            yield
