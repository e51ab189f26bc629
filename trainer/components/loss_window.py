"""How high a loss may be, by those before it: a bound that single outliers do not move."""

import math
import statistics
from collections.abc import Iterable

# 1.4826 times the median absolute deviation estimates the standard deviation of normal values (Hampel, 1974).
_MAD_TO_DEVIATION = 1.4826
# Losses that hardly vary would make any change a spike: deviations are taken to be at least this share of the median.
_SMALLEST_DEVIATION = 0.01
# Before that many losses nothing is judged.
_FEWEST = 16


class LossWindow:
    """The last losses of steps that counted.

    size: how many. threshold: deviations above the median from which a loss is a spike.
    """

    def __init__(self, *, size: int, threshold: float) -> None:
        self.size = size
        self.threshold = threshold
        self._losses: list[float] = []

    def get_bound(self) -> float:
        """Return the highest loss that is no spike; infinity while there are too few to tell."""
        if len(self._losses) < min(_FEWEST, self.size):
            return math.inf
        median = statistics.median(self._losses)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.threshold * max(deviation, _SMALLEST_DEVIATION * abs(median))

    def add(self, loss: float) -> None:
        """Take in a loss. One that is not finite is left out."""
        if math.isfinite(loss):
            self._losses = [*self._losses[1 - self.size :], loss] if self.size > 1 else [loss]

    def state_dict(self) -> list[float]:
        """Return the losses, oldest first."""
        return list(self._losses)

    def load_state_dict(self, losses: Iterable[float]) -> None:
        """Go on with these losses."""
        self._losses = [float(loss) for loss in losses][-self.size :]
