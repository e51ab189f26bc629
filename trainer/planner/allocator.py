"""What torch's caching allocator would reserve for a sequence of allocations: its rules, without a GPU.

Modelled with `expandable_segments:True`, as `run_train.sh` sets it (c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.13): sizes are
rounded to 512 bytes; each stream has a pool of small blocks (up to 1 MiB) and one of large blocks; each pool is one range of
addresses, backed by memory from its beginning on, 2 or 20 MiB at a time; a request takes the smallest free block that is
large enough, by address among equals, and the last one of the range only if there is no other; else the range grows. Memory once reserved stays with its stream. Sizes are in bytes.
"""

import bisect
from dataclasses import dataclass

_ROUNDING = 512
_SMALL_LIMIT = 2**20
_SMALL_PAGE = 2 * 2**20
_LARGE_PAGE = 20 * 2**20


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


@dataclass(eq=False)
class _Block:
    """A part of a range that is in use or free as a whole. Neighbours by address are linked."""

    begin: int
    """Address in the range."""
    size: int
    is_free: bool
    before: "_Block | None" = None
    after: "_Block | None" = None


class _Range:
    """One pool of one stream."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._last: _Block | None = None
        self._free: list[tuple[int, int, _Block]] = []
        """Free blocks by size, those of one size by address."""
        self.reserved = 0

    def allocate(self, size: int) -> _Block:
        """Return a block in use of this size."""
        block = self._find(size) or self._grow(size)
        if block.size > size:
            rest = _Block(block.begin + size, block.size - size, True, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            if self._last is block:
                self._last = rest
            self._add(rest)
        block.is_free = False
        return block

    def _find(self, size: int) -> _Block | None:
        """Take the smallest free block of at least `size`, of several the first. The one at the end, which can grow, counts as larger
        than all others (`get_free_block`).
        """
        place = bisect.bisect_left(self._free, (size,))
        if place == len(self._free):
            return None
        if self._free[place][2] is self._last and place + 1 < len(self._free):
            place += 1
        return self._free.pop(place)[2]

    def _add(self, block: _Block) -> None:
        bisect.insort(self._free, (block.size, block.begin, block))

    def _remove(self, block: _Block) -> None:
        self._free.pop(bisect.bisect_left(self._free, (block.size, block.begin)))

    def _grow(self, size: int) -> _Block:
        """Back more of the range with memory, so that there is a block of `size` at its end."""
        last = self._last
        at_hand = last.size if last is not None and last.is_free else 0
        added = round_up(size - at_hand, self._page)
        self.reserved += added
        if last is not None and last.is_free:
            self._remove(last)
            last.size += added
            return last
        block = _Block(0 if last is None else last.begin + last.size, added, True, before=last)
        if last is not None:
            last.after = block
        self._last = block
        return block

    def free(self, block: _Block) -> None:
        """Give a block back, and join it with free neighbours."""
        block.is_free = True
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._remove(other)
                block.begin = min(block.begin, other.begin)
                block.size += other.size
                self._unlink(other, block)
        self._add(block)

    def _unlink(self, gone: _Block, into: _Block) -> None:
        if into.before is gone:
            into.before = gone.before
            if gone.before is not None:
                gone.before.after = into
        else:
            into.after = gone.after
            if gone.after is not None:
                gone.after.before = into
            if self._last is gone:
                self._last = into


class CachingAllocator:
    """Memory of one device, by stream."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, bool], _Range] = {}
        self._blocks: dict[int, tuple[_Range, _Block]] = {}
        self.reserved = 0
        """All memory taken from the device so far."""
        self.allocated = 0
        """Memory in use, rounded as the allocator does."""

    def allocate(self, key: int, size: int, stream: str) -> None:
        """Serve a request. key: names it for `free`; no bytes take nothing."""
        if size == 0:
            return
        size = round_up(size, _ROUNDING)
        is_small = size <= _SMALL_LIMIT
        place = self._ranges.setdefault((stream, is_small), _Range(_SMALL_PAGE if is_small else _LARGE_PAGE))
        before = place.reserved
        self._blocks[key] = place, place.allocate(size)
        self.reserved += place.reserved - before
        self.allocated += size

    def free(self, key: int) -> None:
        """Take back what `key` was given."""
        if key in self._blocks:
            place, block = self._blocks.pop(key)
            self.allocated -= block.size
            place.free(block)

    def reserved_by_stream(self) -> dict[str, int]:
        """Return the memory that each stream holds."""
        streams: dict[str, int] = {}
        for (stream, _), place in self._ranges.items():
            streams[stream] = streams.get(stream, 0) + place.reserved
        return streams
