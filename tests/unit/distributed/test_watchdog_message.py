"""Who is to blame, from reports of ranks alone, and what a report tells."""

import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from trainer.config.errors import UserError
from trainer.distributed.watchdog import is_peer_error
from trainer.distributed.watchdog_message import Cause, describe, find_cause, write_ranges
from trainer.distributed.watchdog_report import Report, Wait, describe_entry, find_pending, pack_ranks, unpack_ranks

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
    assert not is_peer_error(UserError("/data/nccl-mails/part-0.jsonl, line 7: not valid JSON"))
