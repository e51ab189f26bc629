"""One run on two hosts with addresses of their own. One is cut off: both end, say which is missing, and go on when it is back."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import PACKAGES, PROGRAMS, HostPair
from tests.cluster.test_slurm import ROOT, read_losses
from tests.distributed.training import Run, assert_succeeded
from tests.packages import install
from trainer.components.checkpoint_files import list_steps

pytestmark = pytest.mark.exhaustive

STEPS = 30
TIMEOUT = 10
SETTINGS = (
    "--experimental.custom_import=tests.cluster.paced",
    "--optimizer.name=PacedAdamW",
    f"--training.steps={STEPS}",
    f"--lr_scheduler.total_steps={STEPS}",
    "--checkpoint.enable",
    "--checkpoint.interval=4",
    f"--comm.train_timeout_seconds={TIMEOUT}",
    "--comm.heartbeat_seconds=1",  # a host that was never heard of could not be named
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[HostPair]:
    reason = install(PROGRAMS, PACKAGES)
    if reason:
        pytest.skip(reason)
    pair = HostPair(tmp_path)
    try:
        pair.__enter__()
    except PermissionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with pair:
        yield pair


def start(pair: HostPair, run: Run, pace: float) -> list:
    variables = {
        "CONFIG_FILE": str(run.config_file),
        "BLOOMERY_INSTALL": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "LOG_RANK": "0,1",
        "MASTER_ADDR": pair.hosts[0].address,
        "MASTER_PORT": "29500",  # free: the hosts have their ports to themselves
        "NGPU": "1",
        "NNODES": "2",
        "OMP_NUM_THREADS": "1",
        "PACE_SECONDS": str(pace),
    }
    command = [str(ROOT / "run_train.sh"), *SETTINGS]
    return [
        pair.start(host, *command, **variables, NODE_RANK=str(rank), GLOO_SOCKET_IFNAME=host.device)
        for rank, host in enumerate(pair.hosts)
    ]


def is_under_way(run: Run) -> bool:
    steps = list_steps(run.checkpoints)
    return bool(steps) and read_losses(run)[-1][0] > steps[-1]


def read_status(run: Run) -> dict:
    return json.loads((run.dump_folder / "status.json").read_text())


@pytest.mark.timeout(600)
def test_host_that_is_cut_off_is_named_and_the_run_goes_on_when_it_is_back(pair: HostPair, tmp_path: Path) -> None:
    reference = Run(tmp_path)
    assert_succeeded(reference(2, *SETTINGS))
    run = reference.clone("cut")

    programs = start(pair, run, pace=1)
    end = time.monotonic() + 120
    while not is_under_way(run):
        assert time.monotonic() < end, [log.read_text()[-2000:] for _, log in programs]
        time.sleep(0.1)
    pair.cut()
    began = time.monotonic()
    codes = [program.wait(90) for program, _ in programs]
    assert time.monotonic() - began < TIMEOUT + 30
    first, second = (log.read_text() for _, log in programs)
    assert 0 not in codes
    assert re.search(r"rank 1 \(host host2, pid \d+\) .*dead, frozen or cut off", first), first
    assert re.search(r"rank 0 \(host host1, pid \d+\) is out of reach", second), second
    status = read_status(run)
    assert status["status"] == "failed"
    assert "host2" in status["reason"]

    pair.join()
    programs = start(pair, run, pace=0)
    assert [program.wait(120) for program, _ in programs] == [0, 0], [log.read_text()[-2000:] for _, log in programs]
    assert read_status(run)["status"] == "complete"
    (resume,) = run.lines("resume")
    assert 0 < resume["step"] < STEPS
    expected = {step: values for step, *values in read_losses(reference)}
    losses = read_losses(run)
    assert {step for step, *_ in losses} == {*expected}
    assert [(step, *expected[step]) for step, *_ in losses] == losses
