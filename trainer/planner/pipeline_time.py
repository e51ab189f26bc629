"""How long a pipeline takes for a step: its passes on a clock, each as long as it was found to be."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config.schedule_actions import Action, list_needed
from trainer.planner.recorder import Span
from trainer.planner.streams import COMPUTE


def run_pipeline(
    orders: Sequence[Sequence[Action]], seconds_of: Callable[[Action], float], *, transfer_seconds: float
) -> tuple[float, float]:
    """Return the seconds until all passes are done, and the share of the ranks' time that is spent waiting.

    orders: the passes of each rank. transfer_seconds: of hidden states, from one rank to another.
    """
    rank_of = {action.stage: rank for rank, actions in enumerate(orders) for action in actions}
    last_stage = max(rank_of)
    upcoming = [deque(actions) for actions in orders]
    free_from = [0.0] * len(orders)
    done: dict[Action, float] = {}
    while any(upcoming):
        ends: dict[int, float] = {}
        for rank, actions in enumerate(upcoming):
            needed = list_needed(actions[0], last_stage) if actions else []
            if actions and all(action in done for action in needed):
                arrivals = [
                    done[action] + (transfer_seconds if rank_of[action.stage] != rank else 0.0) for action in needed
                ]
                ends[rank] = max([free_from[rank], *arrivals]) + seconds_of(actions[0])
        assert ends, "the schedule was tried before: no rank waits forever"
        rank = min(ends, key=lambda r: ends[r])
        action = upcoming[rank].popleft()
        free_from[rank] = ends[rank]
        done |= {action._replace(kind=kind): ends[rank] for kind in ("IW" if action.kind == "B" else action.kind)}
    total = max(free_from)
    busy = sum(seconds_of(action) for actions in orders for action in actions)
    return total, 1 - busy / (total * len(orders)) if total else 0.0


@dataclass(frozen=True)
class Interval:
    """From when to when the device was busy with a pass of a pipeline, in seconds."""

    action: Action
    begin: float
    end: float


def split_pairs(intervals: Sequence[Interval], spans: Sequence[Span]) -> list[tuple[Action, float]]:
    """Return the seconds of each pass. Two at once share the time of both as they share the kernels in it."""
    kernels: dict[Action, float] = {}
    for span in spans:
        if span.action is not None and span.stream == COMPUTE:
            kernels[span.action] = kernels.get(span.action, 0.0) + span.seconds
    passes: list[tuple[Action, float]] = []
    upcoming = deque(sorted(intervals, key=lambda interval: interval.begin))
    while upcoming:
        together = [upcoming.popleft()]
        if upcoming and upcoming[0].begin < together[0].end:
            together.append(upcoming.popleft())
        seconds = max(interval.end for interval in together) - together[0].begin
        shares = [kernels.get(interval.action, 0.0) for interval in together]
        for interval, share in zip(together, shares, strict=True):
            passes.append((interval.action, seconds * share / sum(shares) if any(shares) else seconds))
    return passes


def count_all(spans: Sequence[Span], looked_at: Sequence[Action], actions: Sequence[Action]) -> None:
    """Have spans stand for those of the microbatches that were not looked at: of each kind of action those of the middle one.

    looked_at: what a rank of a pipeline did, in one batch or in each of several. actions: what it does in one.
    """
    of_kind: dict[tuple[int, str], list[Action]] = {}
    for action in dict.fromkeys(looked_at):
        of_kind.setdefault((action.stage, action.kind), []).append(action)
    missing = Counter((action.stage, action.kind) for action in actions)
    more: dict[Action, int] = {}
    for key, known in of_kind.items():
        middle = sorted(known, key=lambda action: action.microbatch)[len(known) // 2]
        more[middle] = missing[key] - len(known)
    for span in spans:
        span.times += more.get(span.action, 0) if span.action is not None else 0
