"""How long a pipeline takes for a step: its passes on a clock, each as long as it was found to be."""

from collections import deque
from collections.abc import Callable, Sequence

from trainer.config.schedule_actions import Action, list_needed


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
