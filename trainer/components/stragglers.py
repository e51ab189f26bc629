"""Which rank holds the others up: compared over all ranks in the steps that are logged, at the cost of one small gather.

All ranks take equally long for a step, since they wait for each other. So each measures what it does alone: the seconds
on the host before the first collective of a step (reading its batch, mostly), and on a GPU the time of a fixed matrix product, by
events that nobody waits for: the result is gathered with the next logged step.
"""

import logging
import socket
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from trainer.components.host_copy import HostCopy

logger = logging.getLogger(__name__)

# Some 0.3 ms on an H100.
_SIZE, _REPEATS = 2048, 16
# What a rank does alone is worth a word from this share of a step, and this long, in seconds.
_SHARE, _SHORTEST = 0.1, 0.05


class Stragglers:
    """Compares the ranks of a run. threshold: of the matrix product, as a factor on the median; 0 compares nothing."""

    def __init__(self, *, device: torch.device, threshold: float) -> None:
        """Collective."""
        self._device = device
        self._threshold = threshold
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._hosts = [socket.gethostname()] * self._world_size
        if self.is_active:
            dist.all_gather_object(self._hosts, socket.gethostname())
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._began = time.perf_counter()
        self._alone_seconds = 0.0
        self._steps = 0
        self._is_warm = False
        self._gathered: HostCopy | None = None

    @property
    def is_active(self) -> bool:
        """Whether ranks are compared at all."""
        return self._threshold > 0 and self._world_size > 1

    def begin_step(self) -> None:
        """Note that this rank begins a step."""
        self._began = time.perf_counter()

    def meet_others(self) -> None:
        """Note that this rank comes to the first collective of the step."""
        self._alone_seconds += time.perf_counter() - self._began
        self._steps += 1

    def gather(self) -> None:
        """Bring together what each rank measured since the last call. Waits for nothing on the host. Collective."""
        if not self.is_active:
            return
        by_rank = torch.zeros(self._world_size, 2, device=self._device)
        by_rank[dist.get_rank(), 0].fill_(self._alone_seconds / max(self._steps, 1))
        by_rank[dist.get_rank(), 1].fill_(self._read_events())
        self._alone_seconds, self._steps = 0.0, 0
        dist.all_reduce(by_rank)
        self._time_matmul()
        # The first step of a process opens files and compiles.
        self._gathered = HostCopy(by_rank) if self._is_warm else None
        self._is_warm = True

    def tell(self, *, step_seconds: float) -> dict[str, float]:
        """Warn of ranks that hold others up. Return what the curves show. For one rank, where the host waits anyway.

        step_seconds: of a step, lately.
        """
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return {}
        rows: Sequence[Sequence[float]] = gathered.read()  # type: ignore[assignment]
        alone, matmul = [row[0] for row in rows], [row[1] for row in rows]
        values = {"ranks/alone_seconds": max(alone), "ranks/alone_rank": float(alone.index(max(alone)))}
        excess = max(alone) - statistics.median_low(alone)
        if excess > max(_SHARE * step_seconds, _SHORTEST):
            self._warn(
                alone.index(max(alone)),
                f"others wait for it {excess:.3f} s of a step of {step_seconds:.3f} s: it takes so much longer to read its batch",
            )
        median = statistics.median_low(matmul)
        if median > 0:
            slowest = matmul.index(max(matmul))
            values |= {"ranks/matmul_slowdown": max(matmul) / median, "ranks/matmul_rank": float(slowest)}
            if max(matmul) > self._threshold * median:
                ratio = max(matmul) / median
                self._warn(slowest, f"its GPU takes {ratio:.2f} times the median for the same matrix product")
        return values

    def _warn(self, rank: int, reason: str) -> None:
        logger.warning("rank %d (host %s) is slow: %s", rank, self._hosts[rank], reason)

    def _time_matmul(self) -> None:
        if self._device.type != "cuda":
            return  # cores are shared with other programs: a comparison says nothing
        with torch.no_grad():
            matrix = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=self._device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            matrix @ matrix  # the first one may wait for its kernel to be loaded
            begin.record()
            for _ in range(_REPEATS):
                matrix @ matrix
            end.record()
        self._events = begin, end

    def _read_events(self) -> float:
        """Return the milliseconds of the last product; 0 without one."""
        if self._events is None:
            return 0.0
        begin, end = self._events
        return begin.elapsed_time(end) if end.query() else 0.0
