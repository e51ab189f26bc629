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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import _PRELOAD
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.process_group import init_process_group, open_store
from trainer.distributed.watchdog import Watchdog, is_peer_error
from trainer.distributed.watchdog_message import Cause, describe, find_cause, write_ranges
from trainer.distributed.watchdog_report import Report, Wait, describe_entry, find_pending, pack_ranks, unpack_ranks

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
    # On a busy machine a rank's report may come after the message, which does not wait for long.
    waiting = r"died, last seen in backward of step 412\. (Ranks 0, 2 wait|Rank [02] waits) in all_reduce"
    assert re.search(waiting, message)
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
    assert "ago, last seen in backward of step 412: dead, frozen or cut off. Ranks 0, 2 wait in all_reduce" in message


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


# --- who is to blame ---

FSDP = Wait("all_gather_into_tensor", "mesh_fsdp", "nccl/2", 40, pack_ranks((0, 2)), seconds=80.0)


def make_report(rank: int, wait: Wait | None = None, **fields) -> Report:
    """Return an answer to the call of incident 0."""
    values = {"host": f"gpu{rank // 2}", "namespace": 1, "pid": 100 + rank, "step": 5, "phase": "forward", "answers": 0}
    begun = {wait.group_name: wait.sequence} if wait is not None else {}
    return Report(
        **{"rank": rank, "progressed": 10.0, "posted": 80.0, "wait": wait, "begun": begun, **values, **fields}
    )


def find(reports: list[Report], world_size: int = 4, is_final: bool = True) -> tuple[str, tuple[int, ...]] | None:
    by_rank = {report.rank: report for report in reports}
    cause = find_cause(by_rank, world_size=world_size, incident=0, is_final=is_final)
    return None if cause is None else (cause.kind, cause.ranks)


def test_culprit_is_at_the_end_of_a_chain_of_waits() -> None:
    # 3 computes; 2 waits for it in its tensor-parallel group, and 0 and 1 wait for 2 and 3 in theirs.
    tensor = Wait("all_reduce", "mesh_tp", "nccl/5", 7, pack_ranks((2, 3)))
    behind = {"nccl/2": 39, "nccl/5": 6}
    other = replace(FSDP, ranks=pack_ranks((1, 3)))
    reports = [
        make_report(0, FSDP),
        make_report(1, other),
        make_report(2, tensor, begun={"nccl/2": 39, "nccl/5": 7}),
        make_report(3, begun=behind),
    ]
    assert find(reports) == ("stalled", (3,))
    # With an older gather under way of its own it is no less to blame: others wait for it, and nobody holds it up.
    reports[3] = make_report(3, replace(other, sequence=38), begun={**behind, "nccl/2": 38})
    reports[1] = make_report(1, replace(other, sequence=38))
    assert find(reports) == ("stalled", (3,))


def test_wait_for_a_pipeline_stage_names_that_stage() -> None:
    reports = [
        make_report(0),
        *(
            make_report(rank, Wait("recv", "mesh_pp", "nccl/3", 0, pack_ranks((rank - 1,)), is_p2p=True))
            for rank in (1, 2, 3)
        ),
    ]
    assert find(reports) == ("stalled", (0,))


def test_collective_that_all_are_in_blames_the_device() -> None:
    reports = {rank: make_report(rank, replace(FSDP, ranks=pack_ranks((0, 1)))) for rank in (0, 1)}
    cause = find_cause(reports, world_size=2, incident=0, is_final=True)
    assert cause is not None
    message = describe(cause, reports, now=90.0)
    assert "in step 5 for 80 s: all ranks have begun the same collective" in message
    assert "Ranks 0-1 wait in all_gather_into_tensor of group 'mesh_fsdp'" in message


def test_rank_that_waits_for_a_batch_of_validation_waits_for_its_data() -> None:
    place = "get (trainer/components/data/prefetch.py:97), called from run (trainer/components/validation.py:52)"
    for phase, step, says_so in (("validation", 5, True), ("forward", 5, True), ("start", 0, False)):
        reports = {0: make_report(0, FSDP), 2: make_report(2, phase=phase, step=step, place=place)}
        message = describe(Cause("stalled", (2,)), reports, now=90.0)
        assert ("it waits for its data" in message) == says_so


def test_ranks_of_a_dead_host_are_one_clause() -> None:
    reports = {rank: make_report(rank, replace(FSDP, ranks=())) for rank in range(4)}
    reports |= {rank: replace(reports[rank], answers=-1, wait=None, posted=77.0 + rank) for rank in (2, 3)}
    assert find(list(reports.values()), is_final=False) is None
    cause = find_cause(reports, world_size=4, incident=0, is_final=True)
    assert cause is not None
    message = describe(cause, reports, now=159.0)
    assert (
        "ranks 2-3 (host gpu1) stopped answering 79 s ago, last seen in forward of step 5: dead, frozen or cut off."
        in message
    )


def test_death_goes_before_silence_and_failure_of_its_own_before_connections_lost() -> None:
    dead = make_report(1, answers=-1)
    reports = [make_report(0, FSDP, gone=(1,), end="lost: gloo"), dead, make_report(2, FSDP, end="lost: gloo")]
    assert find(reports, is_final=False) == ("ended", (1,))
    assert find([reports[0], replace(dead, end="finished"), reports[2]], is_final=False) is None
    assert find([reports[0], replace(dead, end="failed: OSError: disk"), reports[2]], 3) == ("ended", (1,))
    assert find([replace(reports[0], gone=()), reports[2]], 3) == ("silent", (1,))
    told_to_end = make_report(1, end="SIGTERM")
    assert find([replace(reports[0], gone=(1,)), told_to_end, reports[2]], 3) == ("terminated", (1,))
    assert find([make_report(0, end="lost: NCCL"), make_report(1, end="lost: NCCL", posted=79.0)], 2) == ("lost", (1,))


def test_cause_is_found_quickly_among_16384_ranks() -> None:
    # 2,048 tensor-parallel groups of 8, and 8 data-parallel ones of 2,048. Rank 4711 stalls.
    reports = {}
    for rank in range(16384):
        wait = Wait("reduce_scatter_tensor", "mesh_fsdp", "nccl/2", 9, ((rank % 8, 8, 2048),))
        if rank // 8 == 4711 // 8:
            wait = Wait("all_reduce", "mesh_tp", "nccl/1", 9, ((rank // 8 * 8, 1, 8),))
        reports[rank] = make_report(rank, wait)
    reports[4711] = make_report(4711)
    begin = time.process_time()
    cause = find_cause(reports, world_size=len(reports), incident=0, is_final=True)
    assert cause is not None
    assert cause.ranks == (4711,)
    message = describe(cause, reports, now=90.0)
    assert time.process_time() - begin < 2.0
    assert len(message) < 1000


def _entry(name: str, number: int, *, is_p2p: bool = False, state: str = "scheduled") -> dict:
    numbers = (
        {"collective_seq_id": 3, "p2p_seq_id": number} if is_p2p else {"collective_seq_id": number, "p2p_seq_id": 0}
    )
    rest = {"pg_id": 0, "process_group": ("4", "mesh_pp"), "retired": state == "completed", "time_created_ns": number}
    return {"profiling_name": f"nccl:{name}", "is_p2p": is_p2p, "state": state, **numbers, **rest}


def test_parts_of_a_finished_batch_are_not_pending() -> None:
    done = [_entry("_all_gather_base", 1), _entry("coalesced", 1, state="completed")]
    assert find_pending(done) is None
    pending = [_entry("_all_gather_base", 2), _entry("coalesced", 2)]
    entry = find_pending([*done, *pending])
    assert entry is pending[1]
    assert describe_entry(entry, [*done, *pending]).operation == "all_gather_into_tensor"


def test_sends_and_receives_are_never_pending_but_what_comes_after_them_is() -> None:
    exchange = [_entry("recv 1<-0", 2, is_p2p=True), _entry("coalesced", 2, is_p2p=True)]
    assert find_pending(exchange) is None
    gather = _entry("_all_gather_base", 7)
    assert find_pending([*exchange, gather]) is gather
    assert describe_entry(exchange[1], exchange).operation == "batch_isend_irecv"
    assert describe_entry(gather, [gather]).operation == "all_gather_into_tensor"


def test_report_travels_as_json() -> None:
    report = make_report(3, replace(FSDP, ranks=pack_ranks(range(1, 16384, 8))), gone=(4,), end="failed: x")
    assert Report.decode(report.encode().encode()) == report
    assert len(report.encode()) < 500
    heartbeat = make_report(3, answers=-1)
    assert Report.decode(heartbeat.encode().encode()) == heartbeat
    assert len(heartbeat.encode()) < 130


@pytest.mark.parametrize("ranks", [[], [5], [0, 1, 2, 4, 5, 6], [0, 8, 16, 17, 3000], [7, 9, 11, 12]])
def test_ranks_are_packed_without_loss(ranks: list[int]) -> None:
    assert list(unpack_ranks(pack_ranks(ranks))) == ranks


def test_ranges_are_written_short() -> None:
    assert write_ranges([*range(13), *range(14, 32), 40]) == "0-12, 14-31, 40"
    assert write_ranges(range(0, 4000, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ..., 3994, 3996, 3998"


def test_errors_of_the_network_may_come_of_a_peer() -> None:
    assert is_peer_error(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    assert is_peer_error(dist.DistBackendError("NCCL communicator was aborted"))
    assert not is_peer_error(ValueError("bad row"))
