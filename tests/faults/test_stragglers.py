"""Slow ranks, hosts and links are named."""

import logging
import socket
import time
from unittest import mock

import torch

from tests.distributed.harness import run_distributed
from trainer.components.stragglers import Stragglers
from trainer.distributed import startup_probe
from trainer.distributed.startup_probe import Figures, find_slow, run_startup_probe


def compare_ranks() -> tuple[list[str], dict[str, float], list[str]]:
    """Let rank 2 be slow to read its batch, and rank 1 to multiply. Return the warnings, the curves, and those of the probe."""
    import torch.distributed as dist

    rank = dist.get_rank()
    socket.gethostname = lambda: f"node{rank}"
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.components.stragglers").addHandler(handler)
    stragglers = Stragglers(device=torch.device("cpu"), threshold=1.5)
    for step in range(3):
        stragglers.begin_step()
        time.sleep(0.4 if rank == 2 and step else 0.0)
        stragglers.meet_others()
        stragglers.gather()
    values = stragglers.tell(step_seconds=0.5) if rank == 0 else {}
    original = startup_probe._time_matmul
    with mock.patch.object(startup_probe, "_time_matmul", lambda *args: original(*args) * (1e-6 if rank == 1 else 1.0)):
        probed = run_startup_probe(0.3, torch.device("cpu"))
    return messages, values, probed


def test_slow_rank_is_named_with_its_host() -> None:
    (messages, values, probed), *others = run_distributed(compare_ranks, 3)
    (message,) = messages
    assert message.startswith("rank 2 (host node2) is slow: others wait for it 0.")
    assert values["ranks/alone_rank"] == 2
    assert all(other[0] == [] for other in others)
    assert any(warning.startswith("rank 1 (host node1) is slow: ") for warning in probed)
    assert not any(warning.startswith(("rank 0", "rank 2")) and "node1" in warning for warning in probed)


def test_slow_links_are_compared_with_links_of_their_kind() -> None:
    inside, between = 400e9, 40e9
    figures = [
        Figures("a", 7e14, inside),
        Figures("a", 7e14, between),
        Figures("b", 7e14, inside),
        Figures("b", 7e14, between),
    ]
    figures = [
        *figures,
        Figures("c", 7e14, inside),
        Figures("c", 7e14, 4e9),
        Figures("d", 5e14, inside),
        Figures("d", 7e14, None),
    ]
    slow_rank, slow_link = find_slow(figures)
    assert slow_rank.startswith("rank 6 (host d) is slow: 500 TFLOP/s")
    assert (
        "rank 5 (host c) and rank 6 (host d) is slow: 4 GB/s each way, where the median between hosts is 40"
        in slow_link
    )
