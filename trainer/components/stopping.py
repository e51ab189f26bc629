"""When a run stops before its last step: each rank may wish it, and all do it after the same step.

Wishes are counted over all ranks: a few numbers that travel with the sum of the losses. The host reads that sum one step
later, when it is there without a wait, so a signal that comes in a step stops the run after the next one. Where
the host waits for the device anyway (after the first step, a validation, a checkpoint) the ranks agree at once.
"""

import logging
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.components.host_copy import HostCopy
from trainer.distributed.stop_signals import StopSignals

logger = logging.getLogger(__name__)

REASONS = ("SIGTERM", "SIGUSR1", "time limit")
# The longest of the last steps counts: some take longer than others, and a deadline is not to be missed by one.
_REMEMBERED_STEPS = 20
_SLACK_SECONDS = 5.0


class Deadline:
    """When this process has to begin to stop, so that the last save is done before its time is over.

    The time that steps and saves take is measured. Before the first save it is taken to be a tenth of the time, a minute at most.
    """

    def __init__(self, seconds: float) -> None:
        """seconds: the time that is left now."""
        self._end = time.monotonic() + seconds
        self._save_seconds = min(60.0, seconds / 10)
        self._slack = min(_SLACK_SECONDS, seconds / 10)
        self._steps: list[float] = []
        self._step_began: float | None = None

    def note_step(self) -> None:
        """Note that a step has ended."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps = [*self._steps[1 - _REMEMBERED_STEPS :], now - self._step_began]
        self._step_began = now

    def note_save(self, seconds: float) -> None:
        """Note how long it took until a checkpoint was whole."""
        self._save_seconds = seconds

    def note_pause(self) -> None:
        """Note that the time since the last step belongs to no step."""
        self._step_began = None

    @property
    def margin(self) -> float:
        """Seconds that stopping takes: the step in which the wish is told, the one after it, and a save and a half."""
        return 2 * max(self._steps, default=0.0) + 1.5 * self._save_seconds + self._slack

    def is_near(self) -> bool:
        """Return whether it is time to stop."""
        return time.monotonic() + self.margin >= self._end


class Stopper:
    """Collects the wishes of all ranks.

    signals: of this process. deadline: of this process; one rank's is enough. reduce_: sums a tensor over all ranks in place,
    without waiting on the host. device: where that works.
    """

    def __init__(
        self,
        *,
        signals: StopSignals | None,
        deadline: Deadline | None,
        reduce_: Callable[[Tensor], object],
        device: torch.device,
    ) -> None:
        self.deadline = deadline
        self.reason = ""
        """Why all ranks stop, the same on each. Empty: they go on."""
        self._signals = signals
        self._reduce = reduce_
        self._device = device
        self._pending: HostCopy | None = None

    def note_save(self, seconds: float) -> None:
        """Note how long it took until a checkpoint was whole."""
        if self.deadline is not None:
            self.deadline.note_save(seconds)

    def get_wishes(self) -> Tensor:
        """Return this rank's wishes, (len(REASONS),) float32 of 0 and 1, to be summed over all ranks."""
        wishes = torch.zeros(len(REASONS), device=self._device)
        reason = "" if self._signals is None else self._signals.requested
        if not reason and self.deadline is not None and self.deadline.is_near():
            reason = "time limit"
        if reason:
            wishes[REASONS.index(reason)].fill_(1.0)
        return wishes

    def end_step(self, wishes: Tensor) -> None:
        """Heed the wishes of the step before, and keep the sum of this one's until the next."""
        self.settle()
        self._pending = HostCopy(wishes)
        if self.deadline is not None:
            self.deadline.note_step()

    def settle(self) -> bool:
        """Heed the wishes that were kept. Return whether the run stops."""
        pending, self._pending = self._pending, None
        if pending is not None and not self.reason:
            counts = pending.read()
            self.reason = next((reason for reason, count in zip(REASONS, counts, strict=True) if count), "")
            if self.reason:
                logger.warning("%s: the run stops", self.reason, extra={"same_on_all_ranks": True})
        return bool(self.reason)

    def poll(self) -> bool:
        """Sum up the wishes of now, and heed those of the last call. Return whether the run stops. Collective; waits for nothing new."""
        wishes = self.get_wishes()
        self._reduce(wishes)
        stops = self.settle()
        self._pending = HostCopy(wishes)
        return stops

    def agree(self) -> bool:
        """Sum up the wishes of now and heed them. Return whether the run stops. Collective; the host waits for it.

        For the pauses between steps: after the first one, which compiles, after a validation, after a save.
        """
        if self.deadline is not None:
            self.deadline.note_pause()
        self.poll()
        return self.settle()


def build_stopper(*, signals: StopSignals | None, ends_at: float | None, device: torch.device) -> Stopper:
    """Return the stopper of a run whose process group is up: from here on signals are asked for.

    ends_at: when the time of this process is over, on the clock of `time.monotonic`. None: not limited, or another rank keeps it.
    """
    if signals is not None:
        signals.is_polled = True
    deadline = None if ends_at is None else Deadline(ends_at - time.monotonic())
    return Stopper(signals=signals, deadline=deadline, reduce_=dist.all_reduce, device=device)
