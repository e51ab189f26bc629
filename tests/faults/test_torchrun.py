"""run_train.sh and torchrun as a user has them: a failure is told, all processes go, and the run goes on in place."""

from pathlib import Path

from tests.distributed.test_torchrun import start
from tests.distributed.training import Run
from tests.faults.harness import read_status


def test_failed_run_is_restarted_in_place_and_resumes(tmp_path: Path) -> None:
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
