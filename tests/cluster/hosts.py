"""Two hosts on one machine, with a name and an address each: network namespaces joined by a virtual cable."""

import os
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

from tests.cluster.keeper import Keeper, find_descendants
from tests.packages import PATH

PROGRAMS = ("ip", "nsenter", "unshare")
PACKAGES = ("iproute2", "util-linux")


class Host:
    """One of the two: its name, its address and its end of the cable."""

    def __init__(self, number: int) -> None:
        self.name = f"host{number}"
        self.address = f"10.99.0.{number}"
        self.device = f"bl{os.getpid() % 100_000}x{number}"


class HostPair(AbstractContextManager):
    """Two hosts. Use it in a `with` statement, which leaves neither processes nor namespaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = (Host(1), Host(2))
        self._environment = {**os.environ, "PATH": PATH}
        self._namespaces: dict[Host, int] = {}
        self._keepers: list[Keeper] = []

    def __enter__(self) -> "HostPair":
        """Make both, and lay the cable.

        Raises:
            PermissionError: this process may not do that.
        """
        try:
            for host in self.hosts:
                self._namespaces[host] = self._open_namespace()
            first, second = self.hosts
            self._run("ip", "link", "add", first.device, "type", "veth", "peer", "name", second.device)
            for host in self.hosts:
                self._run("ip", "link", "set", host.device, "netns", str(self._namespaces[host]))
                self._run_in(host, "sh", "-c", f"echo {host.name} > /proc/sys/kernel/hostname")
                self._run_in(host, "ip", "address", "add", f"{host.address}/24", "dev", host.device)
                self._run_in(host, "ip", "link", "set", "lo", "up")
            self.join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.kill()

    def start(self, host: Host, *command: str, **variables: str) -> tuple[Keeper, Path]:
        """Start a program on a host; return it and the file that it writes to."""
        log = self.folder / f"{host.name}.{len(self._keepers)}.log"
        keeper = Keeper(self._enter(host, *command), log, {**self._environment, **variables})
        self._keepers.append(keeper)
        return keeper, log

    def cut(self) -> None:
        """Pull the cable out: packets are lost, and nobody is told."""
        self._run_in(self.hosts[1], "ip", "link", "set", self.hosts[1].device, "down")

    def join(self) -> None:
        """Put the cable in."""
        for host in self.hosts:
            self._run_in(host, "ip", "link", "set", host.device, "up")

    def _open_namespace(self) -> int:
        """Return a process that keeps a namespace of its own open."""
        keeper = Keeper(
            ["unshare", "--net", "--uts", "sleep", "infinity"], self.folder / "hosts.log", self._environment
        )
        self._keepers.append(keeper)
        ours, end = os.readlink("/proc/self/ns/uts"), time.monotonic() + 10
        while time.monotonic() < end:
            for pid in find_descendants(keeper.pid):
                if os.readlink(f"/proc/{pid}/ns/uts") != ours:  # entered after that of the network
                    return pid
            time.sleep(0.02)
        raise PermissionError((self.folder / "hosts.log").read_text() or "no namespace within 10 s")

    def _enter(self, host: Host, *command: str) -> list[str]:
        return ["nsenter", f"--target={self._namespaces[host]}", "--net", "--uts", *command]

    def _run_in(self, host: Host, *command: str) -> None:
        self._run(*self._enter(host, *command))

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")
