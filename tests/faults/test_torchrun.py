"""run_train.sh and torchrun as a user has them: a failure is told, the run goes on in place, and stops when the launchers are told to."""

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.test_torchrun import describe_start
from tests.distributed.training import Run
from tests.faults.harness import KILL_SECONDS, read_status
from trainer.components.checkpoint_files import list_steps


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_hosts(stack: contextlib.ExitStack, hosts: int, command: dict, log: Path) -> list[subprocess.Popen]:
    """Start run_train.sh as on so many hosts that find each other by an endpoint."""
    if hosts > 1:
        command["env"] |= {"NNODES": str(hosts), "RDZV_ENDPOINT": f"127.0.0.1:{find_free_port()}", "LOG_RANK": "0,1"}
    file, launchers = stack.enter_context(log.open("a")), []
    for _ in range(hosts):
        launchers.append(stack.enter_context(subprocess.Popen(**command, stdout=file, stderr=subprocess.STDOUT)))
        stack.callback(launchers[-1].terminate)  # where the test fails; it does nothing to one that has ended
    return launchers


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [1, 2])
def test_failed_run_is_restarted_in_place_resumes_and_stops_on_sigterm(hosts: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    endless = ["--checkpoint.enable", "--training.steps=100000", "--lr_scheduler.total_steps=7"]
    failing = "--experimental.custom_import=tests.faults.failing_module"
    command = describe_start(run, "--max-restarts", "1", *endless, failing, processes=2 // hosts)
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        launchers = start_hosts(stack, hosts, command, log)
        metrics = run.dump_folder / "metrics.jsonl"
        while not metrics.exists() or not run.lines("resume") or run.lines()[-1]["step"] < 6:
            assert all(launcher.poll() is None for launcher in launchers), log.read_text()
            time.sleep(0.1)
        for launcher in launchers:
            launcher.send_signal(signal.SIGTERM)  # as `kill` and `scancel` do
        began = time.monotonic()
        for launcher in launchers:
            launcher.wait(60)
    output = log.read_text()
    assert time.monotonic() - began < KILL_SECONDS, output
    assert "failed in forward and backward of step 3: ValueError: the loss of rank 1 is wet" in output
    assert [line["step"] for line in run.lines("resume")] == [2]
    (start,), (resume,) = run.lines("start"), run.lines("resume")
    assert resume["time"] - start["time"] < 60
    status = read_status(run)
    assert (status["status"], status["reason"]) == ("preempted", "SIGTERM"), output
    assert list_steps(run.checkpoints)[-1] == status["step"] >= 6
    assert [line["step"] for line in run.lines()] == [*range(1, status["step"] + 1)]
