"""A real SLURM on this machine, for a test: munged, slurmctld and some slurmd, each a node of its own to SLURM."""

import getpass
import os
import socket
import subprocess
import time
from pathlib import Path

from tests.cluster.keeper import Keeper
from tests.packages import PATH

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
PACKAGES = ("slurm-wlm", "munge")


def find_ports(count: int) -> int:
    """Return the first of `count` ports in a row that are free."""
    for first in range(17000 + os.getpid() % 200 * 10, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


class SlurmCluster:
    """A SLURM of its own. Use it in a `with` statement, which leaves nothing running."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        port = find_ports(nodes + 1)
        values = {
            "FOLDER": str(folder),
            "HOST": socket.gethostname().split(".")[0],
            "USER": getpass.getuser(),
            "CTLD_PORT": str(port),
            "NODE_PORTS": f"{port + 1}-{port + nodes}",
            "NODES": str(nodes),
        }
        text = (HERE / "slurm.conf").read_text()
        for name, value in values.items():
            text = text.replace(name, value)
        (folder / "state").mkdir(parents=True)
        self.conf = folder / "slurm.conf"
        self.conf.write_text(text)
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}
        self._keepers: dict[str, Keeper] = {}

    def __enter__(self) -> "SlurmCluster":
        try:
            key = self.folder / "munge.key"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
            files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
            self._keep("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
            self._wait_for("munged", lambda: (self.folder / "munge.socket").exists())
            self._keep("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for node in self.nodes:
                self.start_node(node)
            self._wait_for("the nodes", lambda: self.get_node_states() == ["idle"] * len(self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all."""
        for name in [*self._keepers]:
            self._kill(name)

    def start_node(self, node: str) -> None:
        """Let a node come to life, or back to it."""
        self._keep(node, "slurmd", "-D", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and all that runs on it, at once."""
        self._kill(node)

    def call(self, *command: str, **variables: str) -> str:
        """Run a command of SLURM's, or one that calls them, and return what it prints."""
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.describe()}"
        return done.stdout.strip()

    def get_node_states(self) -> list[str]:
        """Return the state of each node as SLURM sees it."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "normal", "-o", "%T"], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.split()

    def get_job(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job, by its names of fields."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def release(self, job: str, *changes: str) -> None:
        """Let a job that was queued again start soon, and not after the two minutes that SLURM holds it.

        At once would be too soon: a node refuses a job that it has just ended.
        """
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3", *changes)

    def describe(self) -> str:
        """Return what the daemons logged last."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"\n== {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]) for log in logs)

    def _keep(self, name: str, *command: str) -> None:
        self._keepers[name] = Keeper(command, self.folder / f"{name}.log", self.environment)

    def _kill(self, name: str) -> None:
        self._keepers.pop(name).kill()

    def _wait_for(self, what: str, is_there, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < end, f"{what} did not come within {seconds} s{self.describe()}"
            time.sleep(0.1)
