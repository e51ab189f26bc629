"""What the watchdog needs of its host: the state of other processes, and to be woken, by SIGTERM too."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading
from pathlib import Path
from typing import Literal

from trainer.distributed.stop_signals import SIGNALS, StopSignals


def get_process_namespace() -> int:
    """Return a number that is the same for processes that see each other's ids. 0: not known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def get_process_state(pid: int) -> Literal["running", "stopped", "gone"]:
    """Return what a process of this host does. One that has died but was not waited for is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except (OSError, IndexError):
        return "running"
    return "gone" if letter in "ZX" else "stopped" if letter in "Tt" else "running"


class Bell:
    """Wakes a thread that rests, when rung and when SIGTERM comes.

    Made on the main thread, in a program that leaves SIGTERM alone or handles it by `signals`, it hears of that signal: the
    thread that rests sees it at once, even while the main thread is in C code and no handler in Python could run, and ends
    the process by `die` if that is called for. In a program that leaves SIGTERM alone nothing else ends it.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._signals = signals
        self._catches = False
        self.is_terminated = False
        """Whether SIGTERM has come."""
        self.asked_by = ""
        """Name of the stop signal that came last, on its way to `signals`. Empty: none."""
        on_main_thread = threading.current_thread() is threading.main_thread()
        is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if on_main_thread and (is_default or self._is_handled_by_signals()):
            other = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            if other != -1:  # an event loop of the program's
                signal.set_wakeup_fd(other)
                return
            if is_default:
                signal.signal(signal.SIGTERM, _wait_for_the_thread)
            self._catches = True
            # A child that is terminated would ring its parent's bell.
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
            )

    def ring(self) -> None:
        """Wake the thread."""
        with contextlib.suppress(OSError):  # full: it is ringing
            self._writer.send(b"\0")

    def rest(self, seconds: float) -> None:
        """Sleep this long, or until the bell rings."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, seconds))
        if ready:
            with contextlib.suppress(BlockingIOError):
                numbers = self._reader.recv(4096)
                # The program may have taken the signal since.
                is_ours = signal.getsignal(signal.SIGTERM) is _wait_for_the_thread or self._is_handled_by_signals()
                if self._catches and is_ours:
                    self.is_terminated |= signal.SIGTERM in numbers
                    self.asked_by = next((number.name for number in SIGNALS if number in numbers), self.asked_by)

    def die(self) -> None:
        """End the process as SIGTERM does where nobody handles it."""
        self.restore_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)

    def restore_sigterm(self) -> None:
        """Let SIGTERM end the process again. For the thread that rests, which may not call signal.signal()."""
        if self._catches:
            ctypes.pythonapi.PyOS_setsig(int(signal.SIGTERM), None)

    def _is_handled_by_signals(self) -> bool:
        return self._signals is not None and self._signals.is_installed

    def close(self) -> None:
        """Give SIGTERM back, unless the program has taken it meanwhile. Call it where the bell was made."""
        self._let_go()
        self._reader.close()
        self._writer.close()

    def _let_go(self) -> None:
        if not self._catches:
            return
        self._catches = False
        if signal.getsignal(signal.SIGTERM) is _wait_for_the_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        other = signal.set_wakeup_fd(-1)
        if other != self._writer.fileno():
            signal.set_wakeup_fd(other)

    def _before_fork(self) -> None:
        if self._catches:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _after_fork(self) -> None:
        if self._catches:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _after_fork_in_child(self) -> None:
        if self._catches:
            self._let_go()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # one that came meanwhile ends the child


def _wait_for_the_thread(*_: object) -> None:
    """Do nothing: the thread that rests has been woken, and ends the process."""
