"""Python garbage collection at chosen steps, the same on all ranks.

Left to itself, Python collects on each rank at a different moment, and one rank that pauses makes all wait in the next
collective. Collecting everywhere between the same two steps costs the pause once.
"""

import gc
import logging
import time
from collections import Counter

import torch

logger = logging.getLogger(__name__)

# Young objects are collected at each turn. What survives moves to the oldest generation, which only a full pass frees.
FULL_EVERY = 20


class GarbageCollection:
    """Switches automatic collection off, and collects every `freq` steps instead.

    What lives at the start (modules, the model, compiled code) is frozen: no later pass looks at it, so that even full
    passes stay short.

    Args:
        freq: steps from one collection to the next; 0 leaves collection to Python.
        debug: every pass is a full one and logs what it found, by type. Reference cycles that hold tensors keep device
            memory until a pass comes, so these are a warning.
    """

    def __init__(self, *, freq: int, debug: bool = False) -> None:
        if freq < 0:
            raise ValueError(
                f"training.gc_freq = {freq}: must be 0 (leave it to Python) or the steps between collections"
            )
        self._freq = freq
        self._debug = debug
        self._turns = 0
        if freq:
            gc.disable()
            gc.collect()
            gc.freeze()

    def step(self, step: int) -> None:
        """Collect if it is the turn of `step`. Call it on every rank, after each step."""
        if not self._freq or step % self._freq:
            return
        self._turns += 1
        generation = 2 if self._debug or self._turns % FULL_EVERY == 0 else 1
        begin = time.perf_counter()
        found = self._collect_and_report() if self._debug else gc.collect(generation)
        seconds = time.perf_counter() - begin
        level = logging.INFO if self._debug else logging.DEBUG
        logger.log(level, "garbage collection at step %d: %d objects, %.3f s", step, found, seconds)

    def close(self) -> None:
        """Give collection back to Python."""
        if self._freq:
            gc.unfreeze()
            gc.enable()

    @staticmethod
    def _collect_and_report() -> int:
        flags = gc.get_debug()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            found = list(gc.garbage)
        finally:
            gc.set_debug(flags)
            gc.garbage.clear()
        names = Counter(type(item).__name__ for item in found).most_common(5)
        if found:
            logger.info("garbage by type: %s", ", ".join(f"{name} {count}" for name, count in names))
        # isinstance() would ask an object for its __class__, which proxies answer by running code.
        tensors = [item for item in found if issubclass(type(item), torch.Tensor)]
        if tensors:
            size = sum(tensor.nbytes for tensor in tensors)
            logger.warning("reference cycles held %d tensors (%d bytes) until this collection", len(tensors), size)
        count = len(found)
        del found, tensors
        gc.collect()
        return count
