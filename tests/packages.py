"""Programs that tests need and Debian has: installed where that is possible and allowed."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Daemons and network tools are not on every user's path.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
SECONDS = 150
# Debian asks it whether a package's daemon may be started.
POLICY = Path("/usr/sbin/policy-rc.d")


def find_missing(programs: tuple[str, ...]) -> list[str]:
    """Return those of the programs that are not there."""
    return [name for name in programs if shutil.which(name, path=PATH) is None]


def install(programs: tuple[str, ...], packages: tuple[str, ...]) -> str:
    """Install Debian packages if programs are missing. Return why they still are; empty: all are there."""
    missing = find_missing(programs)
    if not missing:
        return ""
    reason = f"{', '.join(missing)} missing, and {' '.join(packages)} not installed"
    if os.environ.get("BLOOMERY_INSTALL") == "0":
        return f"{reason}: BLOOMERY_INSTALL=0"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{reason}: that takes root and apt-get"
    with only_one_at_a_time():
        return _install(programs, packages, reason)


def _install(programs: tuple[str, ...], packages: tuple[str, ...], reason: str) -> str:
    options = ["-q", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        try:
            with daemons_left_alone():
                done = subprocess.run(
                    ["apt-get", *options, *command], env=environment, capture_output=True, text=True, timeout=SECONDS
                )
        except subprocess.TimeoutExpired:
            return f"{reason}: apt-get {command[0]} took over {SECONDS} s"
        if done.returncode:
            return f"{reason}: apt-get {command[0]} failed: {done.stderr[-300:]}"
    return f"{reason}: the packages do not have them" if find_missing(programs) else ""


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Wait for other tests that install something."""
    with (Path(tempfile.gettempdir()) / "bloomery-packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def daemons_left_alone() -> Iterator[None]:
    """Let no package start a daemon while it is installed, unless this machine has a policy of its own."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
