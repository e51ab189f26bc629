"""One message names who stalled or died. Each test breaks one of some processes, and reads what the ranks log."""

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import _PRELOAD
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.process_group import init_process_group, open_store
from trainer.distributed.watchdog import Watchdog

HOST = socket.gethostname()
WORLD_SIZE = 3
TRAIN_TIMEOUT = 1.6  # of the watchdog; the process group's is longer, so that no error comes between
BEAT = 0.1


@dataclass
class End:
    """How a process ended, and what it logged."""

    exit_code: int
    log: str
    stderr: str


def run(
    fn: Callable[[int, Watchdog], None],
    store: str,
    folder: Path,
    *,
    starting: int = WORLD_SIZE,
    init_timeout: float = 40.0,
    hosts: Sequence[str] = (HOST,) * WORLD_SIZE,
) -> list[End]:
    """Run `fn` on processes that may die, and return their ends.

    store: `file`, or `tcp`, whose server is rank 0's. starting: how many of the `WORLD_SIZE` processes start at all.
    hosts: names of the hosts that the ranks believe to be on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] if store == "tcp" else 0
    arguments = [(fn, rank, port, folder, init_timeout, hosts[rank]) for rank in range(starting)]
    processes = [context.Process(target=_run_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    ends = []
    for rank, process in enumerate(processes):
        process.join(30)
        assert process.exitcode is not None, f"rank {rank} is still running"
        texts = [folder / f"{rank}.{name}" for name in ("log", "stderr")]
        ends.append(End(process.exitcode, *(text.read_text() for text in texts)))
    return ends


def _run_rank(fn: Callable, rank: int, port: int, folder: Path, init_timeout: float, host: str) -> None:
    torch.set_num_threads(1)
    socket.gethostname = lambda: host
    log = folder / f"{rank}.log"
    logging.basicConfig(filename=log, format="%(levelname)s %(message)s", level=logging.INFO, force=True)
    stderr = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, sys.stderr.fileno())
    comm = CommConfig(init_timeout_seconds=init_timeout, heartbeat_seconds=BEAT)  # type: ignore[arg-type]
    code = 1
    try:
        with Watchdog(comm) as watchdog:
            if port:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                options: dict[str, Any] = {"comm": comm, "rank": rank, "world_size": WORLD_SIZE}
                opened = open_store(**options, watchdog=watchdog)
                init_process_group(opened, **options, device_type="cpu", dump_folder=folder)
            else:
                store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
                watchdog.start(store, rank=rank, world_size=WORLD_SIZE)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
            dist.barrier()
            fn(rank, watchdog)
        code = 0
    finally:
        os._exit(code)


def all_reduce() -> None:
    dist.all_reduce(torch.ones(4))


def come_to(watchdog: Watchdog, step: int, phase: str) -> None:
    """Make progress, which the next heartbeat tells."""
    watchdog.progress(step, phase)
    time.sleep(3 * BEAT)


def find_lines(ends: list[End], level: str = "ERROR") -> list[str]:
    return [line.removeprefix(level + " ") for end in ends for line in end.log.splitlines() if line.startswith(level)]


def get_message(ends: list[End]) -> str:
    found = find_lines(ends)
    assert len(found) == 1, f"one rank speaks, once: {ends}"
    return found[0]


# --- stalls ---


def _sleep_in_forward(rank: int, watchdog: Watchdog) -> None:
    watchdog.set_timeout(TRAIN_TIMEOUT)
    watchdog.progress(7, "forward")
    if rank == 1:
        time.sleep(2.5)
    all_reduce()
    come_to(watchdog, 8, "forward")
    watchdog.close()
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]


def test_sleeping_rank_is_named_with_its_place(tmp_path: Path) -> None:
    ends = run(_sleep_in_forward, "tcp", tmp_path)
    message = get_message(ends)
    assert message.startswith("training stands still in step 7 for 1.")
    assert f"rank 1 (host {HOST}, pid " in message
    assert "has been in forward of step 7 for 1." in message
    assert "s, at _sleep_in_forward (tests/distributed/test_watchdog.py:" in message
    assert message.endswith(". Ranks 0, 2 wait in all_reduce of group 'default_pg'")
    assert find_lines(ends, "WARNING") == ["training goes on"]
    assert [end.exit_code for end in ends] == [0] * WORLD_SIZE


def _loop_in_data(rank: int, watchdog: Watchdog) -> None:
    watchdog.set_timeout(TRAIN_TIMEOUT)
    watchdog.progress(3, "data")
    end = time.monotonic() + 2.5
    while rank == 2 and time.monotonic() < end:
        sum(range(100))
    dist.all_gather_into_tensor(torch.empty(WORLD_SIZE), torch.ones(1))


def test_rank_in_a_python_loop_is_named(tmp_path: Path) -> None:
    message = get_message(run(_loop_in_data, "file", tmp_path))
    assert f"rank 2 (host {HOST}, pid " in message
    assert "has been in data of step 3 for 1." in message
    assert "s, at _loop_in_data (" in message
    assert message.endswith(". Ranks 0-1 wait in all_gather_into_tensor of group 'default_pg'")


def _wait_for_each_other(rank: int, watchdog: Watchdog) -> None:
    watchdog.set_timeout(TRAIN_TIMEOUT)
    watchdog.progress(4, "backward")
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2], [0, 2])]
    threading.Timer(2.5, os._exit, (0,)).start()
    dist.barrier(group=pairs[(0, 1, 2)[rank]])


def test_crossed_collectives_are_told_with_their_places(tmp_path: Path) -> None:
    message = get_message(run(_wait_for_each_other, "tcp", tmp_path))
    assert "ranks wait for each other, in different collectives. Rank " in message
    assert " of ranks 0, 2 at _wait_for_each_other (tests/distributed/test_watchdog.py:" in message


def _stop_one(rank: int, watchdog: Watchdog) -> None:
    watchdog.set_timeout(TRAIN_TIMEOUT)
    come_to(watchdog, 5, "optimizer")
    if rank == 0:
        # The store is given up after a second only.
        seconds = 4.7 if "MASTER_PORT" in os.environ else 3.4
        os.system(f"(sleep {seconds}; kill -CONT {os.getpid()}) &")
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce()


def test_stopped_process_is_told_to_be_stopped(tmp_path: Path) -> None:
    message = get_message(run(_stop_one, "file", tmp_path))
    assert f"rank 0 (host {HOST}, pid " in message
    assert "ago, last seen in optimizer of step 5: stopped by a signal or a debugger" in message
    assert "Ranks 1-2 wait in all_reduce" in message


def _never(rank: int, watchdog: Watchdog) -> None:
    raise AssertionError("two of three make no process group")


def test_stopped_process_that_holds_the_store_is_told_to_be_stopped(tmp_path: Path) -> None:
    message = get_message(run(_stop_one, "tcp", tmp_path))
    assert f"rank 0 (host {HOST}, pid " in message
    assert "is stopped by a signal or a debugger. The store there does not answer" in message


def test_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    message = get_message(run(_never, "tcp", tmp_path, starting=2, init_timeout=3))
    assert message.startswith("training stands still at its start for ")
    assert "rank 2 has not started: no sign of life so far. Ranks 0-1 wait in init_process_group" in message


# --- deaths ---


# On a busy machine a rank's report may come after the message, which does not wait for long, or know of the group alone.
OTHERS_WAIT = r"(Ranks 0, 2 wait|Rank [02] waits) in all_reduce"


def _die_in_backward(rank: int, watchdog: Watchdog) -> None:
    come_to(watchdog, 412, "backward")
    if rank == 1:
        os._exit(9)
    all_reduce()


def test_death_is_told_at_once_by_one_survivor(tmp_path: Path) -> None:
    begin = time.monotonic()
    ends = run(_die_in_backward, "tcp", tmp_path)
    assert time.monotonic() - begin < 20, "long before any timeout"
    message = get_message(ends)
    assert message.startswith(f"training broke off in step 412: rank 1 (host {HOST}, pid ")
    assert re.search(r"died, last seen in backward of step 412\. " + OTHERS_WAIT, message)
    assert [end.exit_code for end in ends] == [1, 9, 1]


def _die_with_the_store(rank: int, watchdog: Watchdog) -> None:
    come_to(watchdog, 6, "forward")
    if rank == 0:
        os._exit(9)
    all_reduce()


def test_death_of_rank_0_with_the_store_is_told(tmp_path: Path) -> None:
    message = get_message(run(_die_with_the_store, "tcp", tmp_path))
    assert message.startswith(f"training broke off in step 6: rank 0 (host {HOST}, pid ")
    assert "has ended. The store there does not answer, so that the other ranks cannot be asked" in message
    assert "waits in all_reduce" in message


def test_death_on_another_host_is_told_by_its_silence(tmp_path: Path) -> None:
    message = get_message(run(_die_in_backward, "tcp", tmp_path, hosts=("a", "b", "c")))
    assert message.startswith("training stands still in step 412 for ")
    assert "rank 1 (host b, pid " in message
    assert re.search(r"ago, last seen in backward of step 412: dead, frozen or cut off\. " + OTHERS_WAIT, message)


def test_loss_of_the_first_host_with_the_store_is_told_by_the_second(tmp_path: Path) -> None:
    ends = run(_die_with_the_store, "tcp", tmp_path, hosts=("a", "b", "c"))
    assert "rank 0 (host a, pid " in get_message(ends)
    assert "is out of reach: its host or the launcher there is dead or cut off" in get_message(ends)
    assert get_message(ends[1:2]).endswith("Rank 1 waits in all_reduce of group 'default_pg'")


def _fail_alone(rank: int, watchdog: Watchdog) -> None:
    come_to(watchdog, 9, "data")
    if rank == 2:
        raise ValueError("bad row 17")
    all_reduce()


def test_error_of_one_rank_is_told_by_another(tmp_path: Path) -> None:
    message = get_message(run(_fail_alone, "file", tmp_path))
    assert f"rank 2 (host {HOST}, pid " in message
    assert "failed in data of step 9: ValueError: bad row 17. Ranks 0-1 wait in all_reduce" in message


def _be_terminated_after_a_death(rank: int, watchdog: Watchdog) -> None:
    come_to(watchdog, 2, "data")
    if rank == 0:
        os._exit(9)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(10)


def test_survivors_tell_of_a_death_before_sigterm_ends_them(tmp_path: Path) -> None:
    ends = run(_be_terminated_after_a_death, "file", tmp_path)
    message = get_message(ends)
    assert message.startswith(f"training broke off in step 2: rank 0 (host {HOST}, pid ")
    assert "last seen in data of step 2" in message
    assert [end.exit_code for end in ends] == [9, -signal.SIGTERM, -signal.SIGTERM]


# --- no trouble ---


def _be_terminated_together(rank: int, watchdog: Watchdog) -> None:
    come_to(watchdog, 2, "data")
    time.sleep(0.03 * rank)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_sigterm_to_all_is_no_death(store: str, tmp_path: Path) -> None:
    ends = run(_be_terminated_together, store, tmp_path)
    assert find_lines(ends) == []
    assert [end.exit_code for end in ends] == [-signal.SIGTERM] * WORLD_SIZE


def _handle_sigterm_alone(rank: int, watchdog: Watchdog) -> None:
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5 * BEAT)
    watchdog.close()
    assert calls == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)


def test_program_that_handles_sigterm_keeps_it(tmp_path: Path) -> None:
    assert run(_handle_sigterm_alone, "file", tmp_path) == [End(0, "", "")] * WORLD_SIZE


def _train(rank: int, watchdog: Watchdog) -> None:
    for step in range(1, 20):
        watchdog.progress(step, "forward")
        time.sleep(0.05)
        all_reduce()
    firsts = torch.tensor([watchdog.is_first_to_tell(text) for text in ("no such file", f"bad row on rank {rank}")])
    firsts = firsts.long()
    dist.all_reduce(firsts)
    assert firsts.tolist() == [1, WORLD_SIZE], "what all find is told once"
    pid = os.fork()
    if pid == 0:
        time.sleep(10)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM, "a child ends of a SIGTERM of its own"
    time.sleep(3 * BEAT)
    watchdog.close()
    dist.destroy_process_group()


def test_healthy_run_logs_nothing(tmp_path: Path) -> None:
    assert run(_train, "tcp", tmp_path) == [End(0, "", "")] * WORLD_SIZE


def test_one_process_and_no_heartbeat_start_no_thread() -> None:
    for seconds, world_size in ((5, 1), (0, 2)):
        with Watchdog(CommConfig(heartbeat_seconds=seconds)) as watchdog:
            watchdog.start(dist.HashStore(), rank=0, world_size=world_size)
            assert not [thread for thread in threading.enumerate() if "watchdog" in thread.name]
            assert watchdog.explain(RuntimeError("NCCL error")) is None
            assert watchdog.is_first_to_tell("bad row")
