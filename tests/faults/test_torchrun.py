"""run_train.sh and torchrun as a user has them: a failure is told, all processes go, and the run goes on in place."""

import signal
import subprocess
import time
from pathlib import Path

from tests.distributed.test_torchrun import describe_start, start
from tests.distributed.training import Run
from tests.faults.harness import KILL_SECONDS, read_status
from trainer.components.checkpoint_files import list_steps


def test_failed_run_is_restarted_in_place_resumes_and_stops_on_sigterm(tmp_path: Path) -> None:
    run = Run(tmp_path)
    options = ["--checkpoint.enable", "--training.steps=4", "--experimental.custom_import=tests.faults.failing_module"]
    done = start(run, "--max-restarts", "1", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "failed_once").exists()
    assert [line["step"] for line in run.lines("resume")] == [2]
    assert [line["step"] for line in run.lines()] == [1, 2, 3, 4]
    assert read_status(run)["status"] == "complete"
    output = done.stdout + done.stderr
    assert "failed in forward and backward of step 3: ValueError: the loss of rank 1 is wet" in output
    times = [line["time"] for line in run.lines("start") + run.lines("resume")]
    assert times[1] - times[0] < 60
    stop_by_the_launcher(run)


def stop_by_the_launcher(run: Run) -> None:
    """Prolong the run, and send SIGTERM to torchrun as `kill` and `scancel` do."""
    options = [
        "--checkpoint.enable",
        "--training.steps=100000",
        "--lr_scheduler.total_steps=7",
        "--checkpoint.interval=50000",
    ]
    with subprocess.Popen(
        **describe_start(run, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while len(run.lines("resume")) < 2 or run.lines()[-1]["step"] < 6:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < KILL_SECONDS, output
    status = read_status(run)
    assert (status["status"], status["reason"]) == ("preempted", "SIGTERM"), output
    assert list_steps(run.checkpoints)[-1] == status["step"] >= 6
    assert "Traceback" not in output.partition("Received 15 death signal")[0]
