"""run_train.sh as a user calls it: processes started by torchrun, on text of this machine."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.distributed.training import Run
from trainer.components.checkpoint_files import list_steps

ROOT = Path(__file__).resolve().parents[2]


def describe_start(run: Run, *overrides: str, processes: int = 2) -> dict:
    """What `subprocess` needs to know: command, folder, environment."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CONFIG_FILE": str(run.config_file),
        "NGPU": str(processes),
        "CUDA_VISIBLE_DEVICES": "",
        "BLOOMERY_INSTALL": "0",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOG_RANK", "NNODES", "MASTER_ADDR"):
        environment.pop(name, None)
    return {"args": [str(ROOT / "run_train.sh"), *overrides], "cwd": run.folder, "env": environment}


def start(run: Run, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(
        **describe_start(run, *overrides, processes=processes), capture_output=True, text=True, timeout=200
    )


def test_two_processes_learn_stop_and_resume(tmp_path: Path) -> None:
    run = Run(tmp_path)
    text = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    overrides = [
        *("--training.dataset=text", f"--training.dataset_path={text}", "--training.global_batch_size=8"),
        *("--lr_scheduler.total_steps=24", "--checkpoint.enable", "--checkpoint.async_mode=async"),
    ]
    first = start(run, *overrides, "--training.steps=16", "--checkpoint.interval=10")
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("step 16/16") == 1, "one rank speaks"
    assert "trained 16 steps" in first.stdout
    assert list_steps(run.checkpoints) == [10, 16]
    losses = run.curve()
    assert losses[-1] < losses[0] - 1
    second = start(run, *overrides, "--training.steps=24")
    assert second.returncode == 0, second.stderr[-3000:]
    assert [line["step"] for line in run.lines("resume")] == [16]
    assert [line["step"] for line in run.lines()] == [*range(1, 25)]
    assert run.curve()[:16] == losses
    assert sum(run.curve()[-6:]) < sum(losses[-6:])
    assert run.lines()[-1]["tokens_seen"] == 24 * 8 * 64


def test_mistake_ends_before_torchrun(tmp_path: Path) -> None:
    done = start(Run(tmp_path), "--training.step=3")
    assert done.returncode == 2
    assert done.stderr.startswith("1 problem in the configuration:")
    assert "training.steps" in done.stderr
    assert "Launching" not in done.stdout
