"""run_train.sh and torchrun as a user has them: a failure is told, the run goes on in place, and stops when the launcher is told to."""

import signal
import subprocess
import time
from pathlib import Path

from tests.distributed.test_torchrun import describe_start
from tests.distributed.training import Run
from tests.faults.harness import KILL_SECONDS, read_status
from trainer.components.checkpoint_files import list_steps


def test_failed_run_is_restarted_in_place_resumes_and_stops_on_sigterm(tmp_path: Path) -> None:
    run = Run(tmp_path)
    endless = ["--checkpoint.enable", "--training.steps=100000", "--lr_scheduler.total_steps=7"]
    failing = "--experimental.custom_import=tests.faults.failing_module"
    command = describe_start(run, "--max-restarts", "1", *endless, failing)
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(**command, stdout=file, stderr=subprocess.STDOUT) as process:
        metrics = run.dump_folder / "metrics.jsonl"
        while not metrics.exists() or not run.lines("resume") or run.lines()[-1]["step"] < 6:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # as `kill` and `scancel` do
        began = time.monotonic()
        process.wait(60)
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
