"""Who is to blame when a run stands still or breaks off: found in the ranks' reports, and put in one message."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.distributed.watchdog_report import Report, Wait, unpack_ranks

DATA = "data"
"""The phase of a step in which a rank waits for its batch."""
_DATA_FILES = "trainer/components/data/"
"""Where a rank is that waits for one in another phase, a validation say."""
_SHOWN = 4  # culprits, and collectives, that a message spells out


@dataclass(frozen=True)
class Cause:
    """What is wrong, and with whom. kind:

    - `ended`: processes that are gone without a word, or failed with an error of their own;
    - `silent`: processes that give no answer, or never gave any;
    - `stalled`: processes that live and are not in the collective that others wait in;
    - `crossed`: all wait, each for one that waits for another;
    - `together`: all are in the same collective, and it does not end;
    - `terminated`: processes that were told to end;
    - `lost`: ranks whose connection broke, with nobody to blame.
    """

    kind: str
    ranks: tuple[int, ...]

    @property
    def is_certain(self) -> bool:
        """Whether no further report can change it."""
        return self.kind == "ended"


def find_cause(reports: Mapping[int, Report], *, world_size: int, incident: int, is_final: bool) -> Cause | None:
    """Return what is wrong.

    reports: each rank's last report, of those that gave one. incident: which call they were to answer. is_final: all
    had the time to answer, so that who did not is silent; before, only what is certain is returned.
    """
    gone = {rank for report in reports.values() for rank in report.gone if rank in reports}
    failed = {rank for rank, report in reports.items() if report.end.startswith("failed")}
    ended = failed | {rank for rank in gone if not reports[rank].end}
    if ended:
        return Cause("ended", tuple(sorted(ended)))
    if not is_final:
        return None
    silent = [rank for rank in range(world_size) if rank not in reports or not has_answered(reports[rank], incident)]
    if silent:
        return Cause("silent", tuple(silent))
    for kind, ranks in (
        ("terminated", [rank for rank, report in reports.items() if report.end in ("SIGTERM", "Ctrl-C")]),
        ("stalled", _find_stalled(reports)),
        ("crossed", sorted(_find_blockers(reports))),
    ):
        if ranks:
            return Cause(kind, tuple(sorted(ranks)))
    lost = [report for report in reports.values() if report.end.startswith("lost")]
    if lost:
        return Cause("lost", (min(lost, key=lambda report: report.posted).rank,))
    waiting = [rank for rank, report in reports.items() if report.wait is not None]
    return Cause("together", tuple(sorted(waiting))) if waiting else None


def has_answered(report: Report, incident: int) -> bool:
    """Return whether nothing more is to be expected of a rank in this incident."""
    return report.answers == incident or bool(report.end)


def _find_stalled(reports: Mapping[int, Report]) -> list[int]:
    """Return the ranks that others wait for, and that wait for nobody themselves."""
    blockers = _find_blockers(reports)
    blocking = {blocker for others in blockers.values() for blocker in others}
    roots = sorted(blocking - set(blockers))
    if roots or blockers:
        return roots
    # Send and receive on gloo leave no trace but the line that the thread is in: who is in none is missed.
    idle = [rank for rank, report in reports.items() if report.wait is None and not report.end]
    return idle if len(idle) < len(reports) else []


def _find_blockers(reports: Mapping[int, Report]) -> dict[int, frozenset[int]]:
    """Return for each rank that waits for others which these are."""
    by_wait: dict[tuple, tuple[Wait, list[int]]] = {}
    for rank, report in reports.items():
        if report.wait is not None:
            wait = report.wait
            key = (wait.operation, wait.group_name, wait.sequence, wait.ranks)
            by_wait.setdefault(key, (wait, []))[1].append(rank)
    blockers = {}
    for wait, waiting in by_wait.values():
        members = unpack_ranks(wait.ranks) if wait.ranks else iter(reports)
        absent = frozenset(rank for rank in members if rank in reports and not _is_in(reports[rank], wait))
        for rank in waiting:
            others = absent - {rank} if rank in absent else absent
            if others:
                blockers[rank] = others
    return blockers


def _is_in(report: Report, wait: Wait) -> bool:
    """Return whether a rank has come as far as a collective that another waits in."""
    mine = report.wait
    if wait.is_p2p or not wait.sequence:
        return mine is not None and (not wait.group_name or mine.group_name in ("", wait.group_name))
    if report.begun.get(wait.group_name, 0) >= wait.sequence:
        return True
    # gloo counts sends and receives too, so that its numbers differ between ranks.
    return mine is not None and (mine.group_name, mine.operation) == (wait.group_name, wait.operation)


# --- words ---


def describe(cause: Cause, reports: Mapping[int, Report], *, now: float) -> str:
    """Return the message. now: seconds of this host's clock."""
    step = max((report.step for report in reports.values()), default=0)
    place = f"in step {step}" if step else "at its start"
    stands_still = cause.kind in ("silent", "stalled", "crossed", "together")
    head = f"training {'stands still' if stands_still else 'broke off'} {place}"
    if stands_still:
        head += f" for {_seconds(max(_get_wait_seconds(report) for report in reports.values()))}"
    others = {rank: report for rank, report in reports.items() if rank not in cause.ranks}
    if cause.kind == "together":
        text = (
            "all ranks have begun the same collective and none gets through it: a GPU, its link or the network hangs. "
            + describe_waits(reports)
        )
    elif cause.kind == "crossed":
        text = f"ranks wait for each other, in different collectives. {describe_waits(reports, places=True)}"
    else:
        text = "; ".join(_describe_culprits(cause, reports, now=now))
        waiting = describe_waits(others)
        text += f". {waiting}" if waiting else ""
    return f"{head}: {text}"


def describe_lost_store(first: Report | None, own: Report, *, state: str) -> str:
    """Return the message where the store does not answer, so that the other ranks cannot be asked.

    first: what rank 0 last said. own: the report of the rank that tells. state: of rank 0's process, as far as this
    host knows: `running`, `stopped`, `gone`.
    """
    place = f"in step {own.step}" if own.step else "at its start"
    name = name_ranks([0], {} if first is None else {0: first})
    reason = {"gone": "has ended", "stopped": "is stopped by a signal or a debugger"}.get(
        state, "is out of reach: its host or the launcher there is dead or cut off"
    )
    waits = describe_waits({own.rank: own})
    return (
        f"training broke off {place}: {name} {reason}. "
        f"The store there does not answer, so that the other ranks cannot be asked" + (f". {waits}" if waits else "")
    )


def _get_wait_seconds(report: Report) -> float:
    """Return how long a rank has been waiting, at least; 0 if it does not."""
    if report.wait is None:
        return 0.0
    return report.posted - report.progressed if report.wait.seconds is None else report.wait.seconds


def _describe_culprits(cause: Cause, reports: Mapping[int, Report], *, now: float) -> list[str]:
    """Return a clause for each culprit; culprits of one host and one story share theirs."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for rank in cause.ranks:
        report = reports.get(rank)
        story = (report.host, report.step, report.phase, report.end, report.place) if report else ()
        groups[story].append(rank)
    stopped = {rank for report in reports.values() for rank in report.stopped}
    clauses = []
    for ranks in groups.values():
        known = [reports[rank] for rank in ranks if rank in reports]
        predicate = _tell(cause.kind, known, is_stopped=stopped.issuperset(ranks), now=now)
        clauses.append(f"{name_ranks(ranks, reports)} {_agree(predicate, ranks)}")
    return clauses[:_SHOWN] + ([f"{len(clauses) - _SHOWN} more of the kind"] if len(clauses) > _SHOWN else [])


def _tell(kind: str, culprits: Sequence[Report], *, is_stopped: bool, now: float) -> str:
    """Return what became of culprits with the same story, as a predicate of one. None: it never reported."""
    if not culprits:
        return "has not started: no sign of life so far"
    one = culprits[0]
    moment = f"{one.phase} of step {one.step}" if one.step else one.phase
    name, _, error = one.end.partition(": ")
    if name == "failed":
        return f"failed in {moment}: {error}"
    if name == "lost":
        return f"lost a connection first, in {moment}: {error}"
    if kind == "ended":
        return f"died, last seen in {moment}"
    if kind == "terminated":
        return f"got {name}, in {moment}"
    if kind == "silent":
        seconds = now - max(report.posted for report in culprits)
        guess = "stopped by a signal or a debugger" if is_stopped else "dead, frozen or cut off"
        return f"stopped answering {_seconds(seconds)} ago, last seen in {moment}: {guess}"
    if name == "finished":
        return "has finished and left"
    seconds = now - max(report.progressed for report in culprits)
    told = f"has been in {moment} for {_seconds(seconds)}, at {one.place or 'an unknown place'}"
    return (
        f"{told} (it waits for its data: the source is slow, not the network between ranks)"
        if one.phase == DATA or (one.step and _DATA_FILES in one.place.partition(",")[0])
        else told
    )


def describe_waits(reports: Mapping[int, Report], *, places: bool = False) -> str:
    """Return which ranks wait in which collective, the most frequent first.

    places: say where in the source, and who takes part.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    for rank, report in reports.items():
        if report.wait is not None:
            text = describe_wait(report.wait)
            if places:
                group = f" of {name_ranks([*unpack_ranks(report.wait.ranks)])}" if report.wait.ranks else ""
                text += f"{group} at {report.place or 'an unknown place'}"
            waiting[text].append(rank)
    counts = Counter({text: len(ranks) for text, ranks in waiting.items()}).most_common()
    parts = [f"{name_ranks(waiting[text])} {_agree(f'waits in {text}', waiting[text])}" for text, _ in counts[:_SHOWN]]
    rest = sum(count for _, count in counts[_SHOWN:])
    sentence = "; ".join(parts + ([f"{rest} more ranks wait in others"] if rest else []))
    return sentence[:1].upper() + sentence[1:]


def describe_wait(wait: Wait) -> str:
    """Return a collective with its group."""
    return f"{wait.operation} of group {wait.group!r}" if wait.group else wait.operation


def name_ranks(ranks: Collection[int], reports: Mapping[int, Report] | None = None) -> str:
    """Return `rank 3 (host a, pid 7)` or `ranks 0-3, 8 (host a)`; host and process are those in `reports`."""
    known = [] if reports is None else [reports[rank] for rank in ranks if rank in reports]
    host = f"host {known[0].host}" if known else ""
    if len(ranks) == 1:
        details = f" ({host}, pid {known[0].pid})" if known else ""
        return f"rank {next(iter(ranks))}{details}"
    return f"ranks {write_ranges(ranks)}" + (f" ({host})" if host else "")


def write_ranges(ranks: Iterable[int]) -> str:
    """Return `0-3, 8`; the middle of a long list is left out."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    parts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(parts if len(parts) <= 12 else [*parts[:8], "...", *parts[-3:]])


def _agree(predicate: str, ranks: Collection[int]) -> str:
    """Return a predicate, written for one rank, for these."""
    return predicate if len(ranks) == 1 else re.sub("^has ", "have ", re.sub("^waits ", "wait ", predicate))


def _seconds(seconds: float) -> str:
    return f"{max(0.0, seconds):.{0 if seconds >= 10 else 1}f} s"
