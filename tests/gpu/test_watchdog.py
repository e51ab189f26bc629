"""What the watchdog learns on NCCL, where the host runs ahead of the collectives: it asks PyTorch's flight recorder."""

import logging
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from tests.distributed.harness import run_distributed
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.watchdog import Watchdog
from trainer.distributed.watchdog_report import find_pending, read_flight_recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]


def gather(group: dist.ProcessGroup) -> None:
    dist.all_gather_into_tensor(torch.empty(2048, device="cuda"), torch.ones(1024, device="cuda"), group=group)


def exchange(group: dist.ProcessGroup) -> None:
    """Send to the other rank, and receive from it, before a collective."""
    peer = 1 - dist.get_rank()
    sent, received = torch.ones(1024, device="cuda"), torch.empty(1024, device="cuda")
    operations = [dist.P2POp(dist.isend, sent, peer, group), dist.P2POp(dist.irecv, received, peer, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    gather(group)


BEFORE = {"all_gather_into_tensor": gather, "batch_isend_irecv": exchange}


def stall(operation: str) -> tuple[bool, list[str]]:
    """Let rank 1 come late to a collective. Return whether those before left none pending, and what this rank logs."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(f"{record.levelname} {record.getMessage()}")

    handler = Keep()
    logging.getLogger("trainer.distributed.watchdog").addHandler(handler)
    rank = dist.get_rank()
    group = dist.new_group([0, 1], group_desc="mesh_tp")
    collective = BEFORE[operation]
    with Watchdog(CommConfig(init_timeout_seconds=600, heartbeat_seconds=0.2)) as watchdog:  # type: ignore[arg-type]
        watchdog.start(_get_default_store(), rank=rank, world_size=2)
        for step in range(20):
            watchdog.progress(step, "forward")
            collective(group)
        torch.cuda.synchronize()
        nothing_pending = find_pending(read_flight_recorder()) is None
        dist.barrier()
        watchdog.set_timeout(4.0)
        watchdog.progress(21, "backward")
        if rank == 1:
            time.sleep(6.0)
        collective(group)
        torch.cuda.synchronize()
        watchdog.progress(22, "forward")
        time.sleep(1.0)
    return nothing_pending, messages


@pytest.mark.parametrize("operation", BEFORE)
def test_collective_of_a_stall_is_that_of_the_flight_recorder(operation: str) -> None:
    results = run_distributed(stall, 2, operation, backend="nccl")
    assert [nothing_pending for nothing_pending, _ in results] == [True, True]
    messages = [message for _, messages in results for message in messages]
    assert len(messages) == 2, f"one rank speaks: {messages}"
    assert messages[0].startswith("ERROR training stands still in step 21 for 3.")
    assert "rank 1 (host " in messages[0]
    assert "has been in backward of step 21 for " in messages[0]
    assert "at stall (tests/gpu/test_watchdog.py:" in messages[0]
    assert messages[0].endswith(". Rank 0 waits in all_gather_into_tensor of group 'mesh_tp'")
    assert messages[1] == "WARNING training goes on"
