"""Runs on NCCL of which a rank is killed or stands still: the others end, and the flight recorder is on disk."""

from pathlib import Path

import pytest
import torch

from tests.distributed.training import Run
from tests.faults.actions import die, stall
from tests.faults.harness import Fault, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

OPTIONS = ["--checkpoint.enable", "--model.attn_mask_type=causal"]


def test_others_end_when_a_rank_on_nccl_is_killed(tmp_path: Path) -> None:
    ended = run_job(Run(tmp_path), 2, *OPTIONS, fault=Fault("forward", die, 3, ranks=(1,)), on_gpus=True, timeout=120)
    assert all(ended.exit_codes), ended.output
    assert ended.seconds < 60, ended.output
    assert "training broke off in step 3: rank 1 (host " in ended.output
    assert "died, last seen in " in ended.output
    assert ended.status["status"] == "failed"


def test_rank_on_nccl_that_waits_for_its_data_is_named_and_the_recorder_is_written(tmp_path: Path) -> None:
    run, timeout = Run(tmp_path), 20
    fault = Fault("data", stall, 3, ranks=(1,))
    limit = f"--comm.train_timeout_seconds={timeout}"
    ended = run_job(run, 2, *OPTIONS, limit, fault=fault, kill_seconds=10, on_gpus=True, timeout=180)
    assert all(ended.exit_codes), ended.output
    assert ended.seconds < timeout + 50, ended.output
    assert "(it waits for its data: the source is slow" in ended.output
    assert list((run.dump_folder / "comm_traces").iterdir()), "the flight recorder's file of the rank that waited"
