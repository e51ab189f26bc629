"""Run a program as on a machine of its own, which can be switched off.

`python keeper.py PROGRAM [ARGUMENT ...]` kills everything that the program started when the program ends, or when the keeper's
standard input is closed. Daemons do not get away: a process that detaches itself becomes the keeper's child. Whoever starts a
keeper holds the other end of its input, so that not even a test that is killed leaves something running.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


class Keeper:
    """A program in the care of a keeper, which writes to a log."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *command], stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment
            )

    @property
    def pid(self) -> int:
        """That of the keeper, whose descendants are the program and what it started."""
        return self._process.pid

    def wait(self, seconds: float) -> int:
        """Wait for the program to end, and return its exit code."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """Kill the program and all that it started, at once."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def main(argv: list[str]) -> int:
    """Keep the program in `argv`; return its exit code, or 0 if it was killed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reader, writer = os.pipe()
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    threading.Thread(target=lambda: (child.wait(), os.write(writer, b"\0")), daemon=True).start()
    select.select([sys.stdin, reader], [], [])
    code = child.poll() or 0
    while descendants := find_descendants(os.getpid()):
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0)[0]:
                pass
    return code


def find_descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they started, dead ones that nobody waited for aside."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
