"""What the ranks of a pipeline do and in which order, as data: the actions of a schedule, and their transfers.

The notation is that of torch.distributed.pipelining. `2F5` is the forward pass of stage 2 for microbatch 5, `2B5` the
backward pass; `2I5` is the part of it that gives the gradient of the stage's input, `2W5` the rest, the gradients of
its weights.
"""

import re
from collections import deque
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a rank does for one stage and one microbatch."""

    stage: int
    kind: str
    """F, B, I or W; or SEND_F, RECV_F, SEND_B or RECV_B: the output or input of that stage goes to or comes from
    another rank, of a forward pass (F) or of a backward pass (B)."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = Sequence[Sequence[Action]]
"""Forward and backward passes in the order of execution, by rank."""

# How long they take beside each other, recomputation aside: two matrix products backward for one forward.
_DURATIONS = {"F": 1, "I": 1, "W": 1, "B": 2}

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")
_OVERLAP = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


def parse_actions(text: str) -> list[Action]:
    """Return the actions in one cell of a schedule: none in an empty one, where the rank waits.

    `(2F5;1B3)OVERLAP_F_B` are two; `find_pairs` tells that they belong together.

    Raises:
        ValueError: the text is no action.
    """
    text = text.strip()
    overlap = _OVERLAP.fullmatch(text)
    if overlap:
        both = [action for part in overlap[1].split(";") for action in parse_actions(part)]
        if [action.kind for action in both] != ["F", "B"]:
            raise ValueError(
                f"{text!r} is no action. OVERLAP_F_B takes a forward and a backward pass, as (2F5;1B3)OVERLAP_F_B"
            )
        return both
    match = _ACTION.fullmatch(text)
    if match:
        return [Action(int(match[1]), match[2], int(match[3]))]
    if text:
        raise ValueError(
            f"{text!r} is no action. Write stage, kind and microbatch, as 2F5; kinds are F (forward), B (backward), or "
            "I and W, its parts for inputs and for weights. Transfers are added by the program"
        )
    return []


def find_pairs(cells: Iterable[str]) -> frozenset[Action]:
    """Return the forward passes that are to run at once with the backward pass that follows them, of another stage: those of
    OVERLAP_F_B."""
    both = [parse_actions(cell) for cell in cells if _OVERLAP.fullmatch(cell.strip())]
    return frozenset(forward for forward, backward in both if forward.stage != backward.stage)


def build_gpipe_order(n_ranks: int, n_microbatches: int) -> Order:
    """Return the order of GPipe (Huang et al., arXiv 1811.06965): all forward passes, then all backward passes."""
    return [
        [Action(rank, kind, microbatch) for kind in "FB" for microbatch in range(n_microbatches)]
        for rank in range(n_ranks)
    ]


def build_1f1b_order(n_ranks: int, n_microbatches: int) -> Order:
    """Return the order of 1F1B (Narayanan et al., arXiv 2006.09503): forward and backward passes take turns as soon as
    there is something to go backward with, so that rank r never holds more than `n_ranks - r` microbatches.
    """
    order = []
    for rank in range(n_ranks):
        ahead = min(n_ranks - 1 - rank, n_microbatches)
        actions = [Action(rank, "F", microbatch) for microbatch in range(ahead)]
        for microbatch in range(n_microbatches):
            if ahead + microbatch < n_microbatches:
                actions.append(Action(rank, "F", ahead + microbatch))
            actions.append(Action(rank, "B", microbatch))
        order.append(actions)
    return order


def build_forward_order(stage_ranks: Sequence[int], n_microbatches: int) -> Order:
    """Return an order of forward passes alone, for stages on these ranks: each rank takes its stages one by one."""
    return [
        [
            Action(stage, "F", microbatch)
            for stage, its_rank in enumerate(stage_ranks)
            if its_rank == rank
            for microbatch in range(n_microbatches)
        ]
        for rank in range(max(stage_ranks) + 1)
    ]


def join_backward(order: Order, stages: Container[int] | None = None) -> Order:
    """Return the order with whole backward passes in place of their parts for inputs, without those for weights.

    stages: whose; by default all.
    """

    def is_meant(action: Action) -> bool:
        return stages is None or action.stage in stages

    return [
        [
            action._replace(kind="B") if action.kind == "I" and is_meant(action) else action
            for action in actions
            if action.kind != "W" or not is_meant(action)
        ]
        for actions in order
    ]


@dataclass(frozen=True)
class Timetable:
    """What each rank does, transfers included."""

    actions: tuple[tuple[Action, ...], ...]
    """By rank. Every two ranks have the transfers between them in the same order, all ranks together in one order that
    all keep to: so that none waits for another in a circle, even where transfers wait for each other."""
    pairs: frozenset[Action]
    """Forward passes that run at once with the pass that follows them."""
    bubble: float
    """Share of all ranks' time that is spent waiting, if stages cost the same, a backward pass twice a forward pass,
    and a transfer nothing."""


def build_timetable(order: Order, pairs: Collection[Action] = frozenset()) -> Timetable:
    """Run the order on a clock, and note each transfer with its sender and its receiver at the time when it becomes
    possible.

    pairs: forward passes that run at once with the pass that follows them. Both begin when both can, and end together.

    Raises:
        ValueError: the ranks would wait for each other forever.
    """
    rank_of = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    last_stage = max(rank_of, default=-1)
    upcoming = [deque(actions) for actions in order]
    timed: list[list[Action]] = [[] for _ in order]
    free_from = [0] * len(order)
    done: dict[Action, int] = {}
    while any(upcoming):
        ends = {}
        for rank, actions in enumerate(upcoming):
            group = _list_group(actions, pairs)
            needed = [action for member in group for action in list_needed(member, last_stage)]
            if group and all(action in done for action in needed):
                begin = max([free_from[rank], *(done[action] for action in needed)])
                ends[rank] = begin + sum(_DURATIONS[member.kind] for member in group)
        if not ends:
            waiting = ", ".join(f"rank {rank} with {actions[0]}" for rank, actions in enumerate(upcoming) if actions)
            raise ValueError(f"the ranks wait for each other forever: {waiting}")
        rank = min(ends, key=lambda rank: (ends[rank], rank))
        free_from[rank] = ends[rank]
        group = _list_group(upcoming[rank], pairs)
        timed[rank].extend(group)
        for action in group:
            upcoming[rank].popleft()
            # A whole backward pass gives what both of its parts give.
            done |= {action._replace(kind=kind): ends[rank] for kind in ("IW" if action.kind == "B" else action.kind)}
            neighbour = action.stage + {"F": 1, "W": 0}.get(action.kind, -1)
            if 0 <= neighbour <= last_stage and rank_of[neighbour] != rank:
                letter = "F" if action.kind == "F" else "B"
                timed[rank].append(action._replace(kind=f"SEND_{letter}"))
                timed[rank_of[neighbour]].append(Action(neighbour, f"RECV_{letter}", action.microbatch))
    work = sum(_DURATIONS[action.kind] for actions in order for action in actions)
    length = max(free_from, default=0)
    bubble = 1 - work / (length * len(order)) if length else 0.0
    return Timetable(tuple(map(tuple, timed)), frozenset(pairs), bubble)


def _list_group(upcoming: Sequence[Action], pairs: Container[Action]) -> list[Action]:
    """Return what a rank does next: one pass, or two at once."""
    return [upcoming[i] for i in range(min(len(upcoming), 2 if upcoming and upcoming[0] in pairs else 1))]


def list_needed(action: Action, last_stage: int) -> list[Action]:
    """Return what must be done before: in terms of F, I and W."""
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    needed = [Action(stage, "F", microbatch)]
    return needed if stage == last_stage else [*needed, Action(stage + 1, "I", microbatch)]
