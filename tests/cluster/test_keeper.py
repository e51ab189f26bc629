"""Nothing that a keeper has started outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import keeper
from tests.cluster.keeper import Keeper, find_descendants

# Starts a process that leaves its session and whose parent ends, as a daemon does; and ends itself, if it is told so.
DETACH = "(setsid sh -c 'sleep 60 & exec sleep 60' &); "


def wait_for_descendants(pid: int, count: int) -> list[int]:
    end = time.monotonic() + 20
    while len(found := find_descendants(pid)) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_detached_processes_are_killed_with_their_keeper(tmp_path: Path) -> None:
    kept = Keeper(["sh", "-c", f"{DETACH} sleep 60"], tmp_path / "log", os.environ)
    found = wait_for_descendants(kept.pid, 4)
    kept.kill()
    assert not [pid for pid in found if is_alive(pid)]


def test_detached_processes_are_killed_when_the_program_ends(tmp_path: Path) -> None:
    kept = Keeper(["sh", "-c", f"{DETACH} sleep 0.5; exit 3"], tmp_path / "log", os.environ)
    found = wait_for_descendants(kept.pid, 3)
    assert kept.wait(20) == 3
    assert not [pid for pid in found if is_alive(pid)]


def test_nothing_is_left_when_the_test_is_killed(tmp_path: Path) -> None:
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, {keeper.__file__!r}, 'sh', '-c', {DETACH!r} + 'sleep 60'], stdin=subprocess.PIPE); time.sleep(60)"
    test = subprocess.Popen([sys.executable, "-c", program])
    found = wait_for_descendants(test.pid, 5)
    test.send_signal(signal.SIGKILL)
    test.wait()
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in found):
        assert time.monotonic() < end
        time.sleep(0.05)
