"""A lock on a folder of checkpoints, so that two runs never write into one.

The lock is a file beside the folder, `.checkpoint.lock`, whose owner touches it every few seconds: on a file system that
several hosts share that works where locks of the kernel do not. A lock whose process is known to be dead, or that nobody
has touched for a while, belongs to a run that was killed, and is taken over. No clocks are compared: whoever comes watches.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
PATIENCE_SECONDS = 40.0
"""How long a lock must stand untouched before it counts as left behind."""
_SETTLING_SECONDS = 0.5
"""After a lock is taken over: time for another who did the same to be seen."""

_tokens_of_this_process: set[str] = set()


class FolderTakenError(UserError):
    """Another run writes its checkpoints there."""


class FolderLock:
    """The lock on one folder. Not for the reader of checkpoints, who disturbs nobody."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.parent / f".{folder.name}.lock"
        self._folder = folder
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self.held = False
        """Whether it was taken and not given back. It may have been lost since: `check` tells."""

    def acquire(self) -> None:
        """Take the lock; waits for `PATIENCE_SECONDS` where it is not clear whether its owner lives.

        Raises:
            FolderTakenError: another run has it.
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _tokens_of_this_process.add(self._token)
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            self._take_over()
        else:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._describe())
        self.held = True
        threading.Thread(target=self._beat, name="checkpoint-lock", daemon=True).start()

    def check(self) -> None:
        """Check that the lock is still this run's, if it has one: one that stood still for long may have been taken for dead.

        Raises:
            FolderTakenError: it is not.
        """
        owner = _read(self.path)
        if self.held and owner.get("token") != self._token:
            now = f"{_name(owner)} has it" if owner else "its file is gone"
            raise FolderTakenError(
                f"the lock {self.path} is no longer this run's: {now}. Nothing more is written to {self._folder}, for two "
                "runs would spoil each other's checkpoints"
            )

    def release(self) -> None:
        """Give the lock back, if it is still this run's. Can be called twice."""
        self._stop.set()
        self.held = False
        if _read(self.path).get("token") == self._token:
            with contextlib.suppress(OSError):
                self.path.unlink()
        _tokens_of_this_process.discard(self._token)

    def _take_over(self) -> None:
        owner = _read(self.path)
        if owner.get("token") not in _tokens_of_this_process and not _is_known_dead(owner):
            self._watch(owner)
        if owner.get("token") not in _tokens_of_this_process:
            logger.warning("Taking over the lock %s: the run that left it, %s, has ended.", self.path, _name(owner))
        aside = self.path.with_name(f"{self.path.name}.{self._token}")
        aside.write_text(self._describe(), encoding="utf-8")
        os.replace(aside, self.path)
        if owner.get("token") not in _tokens_of_this_process:
            time.sleep(_SETTLING_SECONDS)
            self.held = True
            self.check()

    def _watch(self, owner: dict[str, Any]) -> None:
        """Wait to see whether the lock's owner lives.

        Raises:
            FolderTakenError: it does.
        """
        logger.info("Waiting up to %.0f s to see whether %s still holds %s.", PATIENCE_SECONDS, _name(owner), self.path)
        first, deadline = _get_signs_of_life(self.path), time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 5)
            signs = _get_signs_of_life(self.path)
            if signs is not None and signs != first:
                raise FolderTakenError(
                    f"{self._folder} is in use: {_name(_read(self.path))} saves its checkpoints there (lock {self.path}). Set "
                    "another job.dump_folder, or wait for that run to end"
                )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # Another's lock must not be kept alive.
            if _read(self.path).get("token") == self._token:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _describe(self) -> str:
        return json.dumps(
            {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), **_identify(os.getpid())}
        )


def _read(path: Path) -> dict[str, Any]:
    """Return what a lock says of its owner; nothing if there is none, or it is being written."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _get_signs_of_life(path: Path) -> tuple[int, int] | None:
    """Return what changes when a lock is touched or replaced."""
    try:
        # Opened, since a network file system then asks its server.
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _identify(pid: int) -> dict[str, str]:
    """Return what tells a process from any other, before or after it, of the same number; nothing where /proc is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
            "pid_space": os.readlink("/proc/self/ns/pid"),
            "born": fields[19],  # in clock ticks since the boot
        }
    except OSError:
        return {}


def _is_known_dead(owner: dict[str, Any]) -> bool:
    """Return whether the owner ran on this machine, since it was switched on, and runs no more."""
    here = _identify(os.getpid())
    if not here or any(owner.get(key) != here[key] for key in ("boot", "pid_space")):
        return False
    return _identify(owner.get("pid", 0)).get("born") != owner.get("born")


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "an unknown run"
