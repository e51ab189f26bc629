"""Memory of one rank over two steps: the recorded changes, replayed through the caching allocator's rules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.planner.allocator import CachingAllocator
from trainer.planner.recorder import Allocation, Change

PARTS = (
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "gathered weights",
    "communication",
    "working memory",
)
"""What memory holds. Working memory is what a pass needs for a moment: results not kept, gradients not reduced yet."""


@dataclass
class Memory:
    """Bytes of one rank."""

    reserved: int
    """What the caching allocator takes from the device: the figure that a run logs."""
    allocated: int
    """Of that, in use at the peak."""
    parts: dict[str, int]
    """Of `allocated`, by `PARTS`."""
    phase: str
    """In which the peak comes: forward, backward or update."""
    curve: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """Parts over the second step: seconds since its beginning, and bytes."""


def replay(changes: Sequence[Change], *, first: int) -> Memory:
    """Return the memory over all changes. first: number of the first change of the second step, which the curve shows."""
    allocator = CachingAllocator()
    live: set[int] = set()
    held: Counter[str] = Counter()
    peak, at_peak, phase = 0, {}, ""
    curve: list[tuple[float, dict[str, int]]] = []
    for number, change in enumerate(changes):
        allocation = change.allocation
        part = name_part(allocation)
        if change.is_taken:
            allocator.allocate(allocation.key, allocation.size, allocation.stream)
            live.add(allocation.key)
            held[part] += allocation.size
        elif allocation.key in live:
            allocator.free(allocation.key)
            live.remove(allocation.key)
            held[part] -= allocation.size
        if allocator.allocated > peak:
            peak, at_peak, phase = allocator.allocated, dict(held), change.phase
        if number >= first:
            curve.append((change.time, dict(held)))
    begin = curve[0][0] if curve else 0.0
    curve = [(time - begin, parts) for time, parts in curve]
    parts = {part: at_peak.get(part, 0) for part in PARTS}
    return Memory(allocator.reserved, peak, parts, phase, curve)


def name_part(allocation: Allocation) -> str:
    """Return what a piece of memory holds, one of `PARTS`."""
    if allocation.is_gathered:
        return "gathered weights"
    if allocation.role:
        return allocation.role
    if allocation.stream.startswith(("reduce", "all-reduce")):
        return "gradients"
    if allocation.stream.startswith("gather"):
        return "communication"
    if allocation.phase == "setup":
        return "parameters"
    return "activations" if allocation.phase == "forward" else "working memory"
