"""One message when a rank stalls or dies: which rank, on which host, in which step, and in what others wait for it.

Each process has a thread that posts signs of life to the store of the process group. Nobody reads them while all is
well. When a rank waits too long in a collective, loses a peer, or sees a process of its host die, it calls all ranks to
report what they are in. One rank gathers the reports, finds the culprit (`watchdog_message`) and logs the message.

Load on the store at 16,384 ranks and a heartbeat every 5 s: 3,300 values of 100 bytes set and 3,300 keys looked up a
second, some 5% of what its one thread manages at 7 us a request, over one more connection for each rank. In trouble
each rank writes some 300 bytes once in 5 s, and one rank reads them all, 512 to a request.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist

from trainer.config.errors import RunError
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.stop_signals import StopRequestedError, StopSignals
from trainer.distributed.watchdog_early_stop import EarlyStop
from trainer.distributed.watchdog_host import Bell, get_process_namespace
from trainer.distributed.watchdog_message import Cause, describe, describe_lost_store, find_cause, has_answered
from trainer.distributed.watchdog_neighbours import Neighbours
from trainer.distributed.watchdog_report import (
    Line,
    Report,
    count_begun,
    describe_place,
    find_wait,
    get_main_stack,
    get_traceback_stack,
)
from trainer.distributed.watchdog_store import NoAnswerError, StoreLine, wait_until

logger = logging.getLogger(__name__)

# A wait of this share of the timeout calls for a message, which has to be out before the timeout ends the process.
_PATIENCE = 0.75
# The longest heartbeat, as a share of the timeout.
_LONGEST_HEARTBEAT = 0.05
_SHORTEST_ANSWER_SECONDS = 1.0
# Once the cause is certain others have this long to say what they are in, in seconds.
_GRACE_SECONDS = 0.5
# The main thread has this long to end by itself when the run is told to stop before training has begun.
_LEAVE_SECONDS = 2.0
_PEER_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


class Watchdog(AbstractContextManager):
    """Watches over the ranks of a run. Does nothing before `start`, and nothing in a run of one process.

    `progress` is all that the training thread pays: one attribute. An error that leaves the `with` block is explained; one that
    needs no traceback (`RunError`) is told here, by one rank of those that ran into it.
    """

    def __init__(
        self,
        comm: CommConfig,
        *,
        signals: StopSignals | None = None,
        on_leave: Callable[[str | None], None] | None = None,
    ) -> None:
        """signals: what handles stop signals, if the program does. on_leave: called on the watchdog's thread right before it ends
        the process for one, with what is known of a death or stall behind it.
        """
        self.signals = signals
        self.on_leave = on_leave
        self.message: str | None = None
        """What was last found out about a death or a stall."""
        self._heartbeat_seconds: float = comm.heartbeat_seconds
        self._timeout: float = comm.init_timeout_seconds
        self._at = (0, "start", time.time())
        self._watch: _Watch | None = None

    def start(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        """Begin to watch. Call it before the process group is made, so that a rank that never comes is named too.

        store: that of the process group; the watchdog clones it. On the main thread SIGTERM is held up until the cause
        has been looked for, unless the program handles it: launchers end the survivors of a death with it, at once. Where
        `signals` handles it, the watchdog ends the process in that case, and otherwise leaves a request to stop to the program; but
        before the first step (`progress`) one of any rank ends all, with exit code 0.
        """
        if world_size > 1 and self._heartbeat_seconds and self._watch is None:
            self._at = (0, "start", time.time())
            self._watch = _Watch(self, store, rank=rank, world_size=world_size)

    def progress(self, step: int, phase: str) -> None:
        """Tell that the training thread has come to a phase (`data`, `forward`, ...) of a step."""
        self._at = (step, phase, time.time())

    def set_timeout(self, seconds: float) -> None:
        """Tell how long a collective may take from now on. Before, it is `comm.init_timeout_seconds`."""
        self._timeout = seconds

    def explain(self, error: BaseException) -> str | None:
        """Tell of an error that ends this rank, and return what is known of its cause; one rank logs that.

        An error of this rank's own is noted for the others, at once. One that a peer may have caused takes up to some
        heartbeats, in which the other ranks report. None: there is nothing to tell.
        """
        return None if self._watch is None else self._watch.explain(error)

    def is_first_to_tell(self, message: str) -> bool:
        """Return whether no other rank has told this before: what all find is told once. True where nothing joins the ranks."""
        return self._watch is None or self._watch.is_first_to_tell(message)

    def close(self) -> None:
        """Stop watching. No thread is left, and other ranks do not miss this one."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RunError) and self.is_first_to_tell(str(error)):
            logger.error("%s", error)
        if error is not None:
            self.explain(error)
        self.close()

    @property
    def at(self) -> tuple[int, str, float]:
        """Step, phase, and when the training thread came there, in seconds of the host's clock."""
        return self._at

    @property
    def interval(self) -> float:
        """Seconds from one heartbeat to the next."""
        return min(self._heartbeat_seconds, self._timeout * _LONGEST_HEARTBEAT)

    @property
    def patience(self) -> float:
        """Seconds that a collective may take before it is a concern."""
        return self._timeout * _PATIENCE


class _Watch:
    """The thread of a watchdog, and what it knows. `explain` and `close` are called from the training thread."""

    def __init__(self, watchdog: Watchdog, store: dist.Store, *, rank: int, world_size: int) -> None:
        self._watchdog = watchdog
        self._rank = rank
        self._world_size = world_size
        self._host, self._namespace = socket.gethostname(), get_process_namespace()
        self._line = StoreLine(store, timeout=max(watchdog.interval, 1.0))
        self._bell = Bell(watchdog.signals)
        self._early_stop = EarlyStop(self._line, self._bell, watchdog.signals)
        self._is_closing = False
        # Why this rank ends, if it does: set by the training thread.
        self._end = ""
        self._lost_in: Sequence[Line] = ()
        # Since when the main thread is where it is.
        self._still_at: tuple = ()
        self._still_since = time.monotonic()
        self._next_reading = 0.0
        self._is_waiting = False
        self._neighbours = Neighbours(
            self._line, rank=rank, world_size=world_size, host=self._host, namespace=self._namespace
        )
        self._begin_incident(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def _begin_incident(self, number: int) -> None:
        """Forget the last incident. Incidents are numbered alike on all ranks."""
        self._incident = number
        self._concerned_since: float | None = None
        self._is_called = False
        self._attempts = 0
        self._has_said = False
        self._message: str | None = None
        self._is_settled = threading.Event()

    def _key(self, name: str) -> str:
        return f"incident{self._incident}/{name}"

    # --- called from the training thread ---

    def explain(self, error: BaseException) -> str | None:
        """See `Watchdog.explain`."""
        is_lost = is_peer_error(error)
        if is_lost:
            self._lost_in = get_traceback_stack(error.__traceback__)
            self._end = f"lost: {_first_line(error)}"
            self._bell.ring()
            wait_until(lambda: self._is_settled.is_set(), self._watchdog.interval + self._answer_seconds + 1.0)
            return self._message
        if isinstance(error, StopRequestedError):
            self._end = "SIGTERM"
            self._early_stop.tell(str(error))
        else:
            interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
            self._end = "Ctrl-C" if interrupted else f"failed: {_first_line(error)}"
        with contextlib.suppress(NoAnswerError):
            self._line.post(self._make_report())
        return None

    def is_first_to_tell(self, message: str) -> bool:
        """See `Watchdog.is_first_to_tell`."""
        try:
            return self._line.claim(f"told/{hashlib.sha256(message.encode()).hexdigest()}")
        except NoAnswerError:
            return True

    def close(self) -> None:
        """See `Watchdog.close`."""
        self._is_closing = True
        self._bell.ring()
        self._thread.join(self._watchdog.interval + 2.0)
        with contextlib.suppress(NoAnswerError):
            if not self._end:
                self._end = "finished"
                self._line.post(self._make_report())
            self._part()
        self._line.close()
        self._bell.close()

    def _part(self) -> None:
        """Wait for the others before this rank ends, if it is the first: it may hold the store, in which they have something to read."""
        self._line.add("closed", 1)
        if self._rank == 0:
            patience = 1.0 + (0.0 if self._end == "finished" else self._watchdog.interval)
            if not self._watchdog.at[0]:  # they read at their next heartbeat, and then may take their time
                patience += self._watchdog.interval + _LEAVE_SECONDS
            count = self._world_size - len(self._neighbours.find_dead())
            wait_until(lambda: self._line.add("closed", 0) >= count, patience)

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._is_closing:
                if self._is_stopped_early():
                    self._leave_early()
                    return
                self._look()
                self._bell.rest(self._watchdog.interval)
                if self._bell.is_terminated and self._must_leave():
                    self._leave()
        except Exception:
            if not self._is_closing:
                logger.exception("the watchdog failed, and is off; training does not depend on it")
                self._bell.restore_sigterm()
        finally:
            self._is_settled.set()

    def _look(self) -> None:
        """Give a sign of life, see whether something is wrong here or elsewhere, and act on it."""
        try:
            self._neighbours.meet()
            was_concerned = self._concerned_since is not None
            is_concerned = self._is_concerned()
            if is_concerned and not was_concerned:
                self._concerned_since = time.monotonic()
                self._line.set(self._key("call"), str(self._rank))
            elif was_concerned and not is_concerned:
                self._line.set(self._key("over"), str(self._rank))
            self._is_called = self._is_called or is_concerned or self._line.has(self._key("call"))
            self._line.post(self._make_report(in_full=self._is_called))
            if self._is_called and self._line.has(self._key("over")):
                if self._has_said:
                    logger.warning("training goes on")
                self._begin_incident(self._incident + 1)
            elif is_concerned and not self._is_settled.is_set():
                self._judge()
        except NoAnswerError:
            if not self._is_settled.is_set() and self._is_concerned():
                self._bell.rest(_GRACE_SECONDS)  # the store may go because all are told to end, this rank next
                if not self._bell.is_terminated:
                    self._tell_of_store()

    def _is_concerned(self) -> bool:
        """Return whether this rank has reason to call the others."""
        return self._end.startswith("lost") or bool(self._neighbours.find_dead()) or self._waits_too_long()

    def _waits_too_long(self) -> bool:
        """Return whether the main thread, or its device, has been in one collective for too long."""
        now, patience = time.monotonic(), self._watchdog.patience
        still_at = (self._watchdog.at, *get_main_stack()[:8])
        if still_at != self._still_at:
            self._still_at, self._still_since = still_at, now
        still = now - self._still_since
        if still < patience / 4 and time.time() - self._watchdog.at[2] < patience:
            self._is_waiting = False
        elif now >= self._next_reading:
            wait = find_wait(get_main_stack())
            self._is_waiting = wait is not None and (still if wait.seconds is None else wait.seconds) >= patience
            # Reading the flight recorder costs: a step that takes long may be in order.
            self._next_reading = now + (0 if wait is not None else patience / 4)
        return self._is_waiting

    def _make_report(self, *, in_full: bool = False) -> Report:
        """Return this rank's report: a heartbeat, or all that it knows."""
        step, phase, progressed = self._watchdog.at
        report = Report(
            rank=self._rank,
            host=self._host,
            namespace=self._namespace,
            pid=os.getpid(),
            step=step,
            phase=phase,
            progressed=progressed,
            posted=time.time(),
            end=self._end,
        )
        if not in_full:
            return report
        stack = self._lost_in or get_main_stack()
        report = dataclasses.replace(
            report,
            answers=self._incident,
            place=describe_place(stack),
            wait=find_wait(stack, is_over=bool(self._lost_in)),
            begun=count_begun(),
        )
        return self._neighbours.add_states(report)

    # --- the message ---

    def _judge(self) -> None:
        """Find the cause and log it, unless another rank does; learn what it said."""
        message = self._line.get(self._key("message"))
        if message is not None:
            self._settle(message.decode())
            return
        assert self._concerned_since is not None
        # One rank judges. If nothing comes of it in time, it has died as well, and another takes its place.
        if time.monotonic() - self._concerned_since < self._attempts * 2 * self._answer_seconds:
            return
        self._attempts += 1
        if self._line.claim(self._key(f"judge{self._attempts}")):
            cause, reports = self._gather(range(self._world_size), seconds=self._answer_seconds)
            if cause is not None and self._is_concerned():
                self._say(cause, reports)

    def _gather(
        self, ranks: Sequence[int], *, seconds: float, only_certain: bool = False
    ) -> tuple[Cause | None, dict[int, Report]]:
        """Return the cause and these ranks' reports, once the cause is certain, all have answered, or time is over."""
        own = self._make_report(in_full=True)
        reports: dict[int, Report] = {}
        end = time.monotonic() + seconds
        while True:
            # Processes first: what one that is gone has said last is then there to be read.
            own = self._neighbours.add_states(own)
            reports |= self._line.read_reports(rank for rank in ranks if not self._has_answered(reports.get(rank)))
            reports[self._rank] = own
            gone = {rank for report in reports.values() for rank in report.gone}
            are_all_in = all(self._has_answered(reports.get(rank)) or rank in gone for rank in ranks)
            is_final = are_all_in or time.monotonic() >= end
            cause = find_cause(
                reports, world_size=self._world_size, incident=self._incident, is_final=is_final and not only_certain
            )
            if is_final or self._is_closing or (self._bell.is_terminated and not only_certain):
                return cause, reports
            if cause is not None and cause.is_certain:
                end = min(end, time.monotonic() + _GRACE_SECONDS)
            self._bell.rest(self._watchdog.interval / 10)

    @property
    def _answer_seconds(self) -> float:
        """Seconds within which a rank that lives has answered a call: it sees the call at its next heartbeat."""
        return max(2 * self._watchdog.interval, _SHORTEST_ANSWER_SECONDS)

    def _has_answered(self, report: Report | None) -> bool:
        return report is not None and has_answered(report, self._incident)

    def _say(self, cause: Cause, reports: dict[int, Report]) -> None:
        """Log the message, unless another rank was first."""
        if self._line.claim(self._key("said")):
            message = describe(cause, reports, now=time.time())
            logger.error(message)
            self._has_said = True
            self._line.set(self._key("message"), message)
            self._settle(message)

    def _settle(self, message: str) -> None:
        self._message = self._watchdog.message = message
        self._is_settled.set()

    def _tell_of_store(self) -> None:
        """Log that the store is gone, if it falls to this rank: without one the ranks cannot agree on who speaks."""
        states = self._neighbours.get_states()
        is_lowest_here = all(states[rank] != "running" for rank in states if rank < self._rank)
        is_only_host = len(states) == self._world_size - 1
        message = describe_lost_store(
            self._neighbours.first, self._make_report(in_full=True), state=states.get(0, "running")
        )
        if is_lowest_here and (is_only_host or self._neighbours.is_second_host):
            logger.error(message)
        self._settle(message)

    def _must_leave(self) -> bool:
        """Return whether SIGTERM ends this process: unless the program sees to it, and can since nobody has died."""
        signals = self._watchdog.signals
        if signals is None or not signals.is_installed:
            return True
        if self._end == "SIGTERM":
            return False  # the main thread is on its way
        if self._end or self._is_settled.is_set() or self._neighbours.find_dead():
            return True
        try:
            return self._line.has(self._key("message"))
        except NoAnswerError:
            return False  # the host of the store may have ended in good order before this rank

    def _leave(self) -> None:
        """End this process, which SIGTERM asks for; tell why, if that is a death on this host."""
        has_failed = bool(self._end) and not self._end.startswith("lost")
        self._end = self._end or "SIGTERM"
        try:
            self._line.post(self._make_report(in_full=True))
            self._neighbours.meet()  # in the first seconds not all have been met
            if not has_failed and not self._is_settled.is_set() and self._neighbours.find_dead():
                here = sorted([self._rank, *self._neighbours.ranks])
                cause, reports = self._gather(here, seconds=_GRACE_SECONDS, only_certain=True)
                if cause is not None:
                    self._say(cause, reports)
            told = self._line.get(self._key("message"))
            self._message = self._message if told is None else told.decode()
        except NoAnswerError:
            pass  # nobody can tell a death from an end on demand
        if self._message is None and self._end.startswith("lost"):
            # A launcher ends the survivors of a death. Those that are told to stop leave together, and lose no connection.
            self._message = "a connection was lost, and SIGTERM came: another rank has died, it is not known which"
            logger.error(self._message)
        if self._watchdog.on_leave is not None:
            self._watchdog.on_leave(self._message)
        self._bell.die()

    def _is_stopped_early(self) -> bool:
        """Return whether this rank or another was told to stop before training began; tell the others."""
        if self._watchdog.at[0] or self._end.partition(":")[0] not in ("", "lost"):
            return False
        if self._bell.is_terminated and self._must_leave():
            return False
        return self._early_stop.is_due()

    def _leave_early(self) -> None:
        """End this process, which has nothing to save yet. The main thread does it, unless it is in C code."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if wait_until(lambda: self._end == "SIGTERM" or self._is_closing, _LEAVE_SECONDS):
            return
        self._end = "SIGTERM"
        if self._watchdog.on_leave is not None:
            self._watchdog.on_leave(None)
        with contextlib.suppress(NoAnswerError):
            self._line.post(self._make_report())
            self._part()
        os._exit(0)


def is_peer_error(error: BaseException) -> bool:
    """Return whether an error may come of what became of another rank: a broken connection, a collective's timeout."""
    text = str(error).lower()
    is_own = isinstance(error, RunError)
    return not is_own and (isinstance(error, dist.DistError) or any(sign in text for sign in _PEER_ERRORS))


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
