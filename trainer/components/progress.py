"""The progress bar of a run."""

import os
import sys

from tqdm import tqdm


class ProgressBar:
    """Steps done, steps to go and the time that these will take, on a terminal; nothing anywhere else.

    Args:
        total: steps of the whole run.
        initial: steps already done when the bar begins (a resumed run).
        enabled: whether it is wanted. It is shown only if stderr is a terminal too.
    """

    def __init__(self, *, total: int, initial: int = 0, enabled: bool = True) -> None:
        shown = enabled and sys.stderr.isatty()
        # Some terminals (docker, script) say that they have no rows, and tqdm then draws nothing.
        sizeless = shown and 0 in os.get_terminal_size(sys.stderr.fileno())
        self._bar = tqdm(
            total=total,
            initial=initial,
            disable=not shown,
            desc="training",
            unit="step",
            leave=False,
            smoothing=0.05,
            dynamic_ncols=not sizeless,
            ncols=80 if sizeless else None,
            nrows=24 if sizeless else None,
        )

    @property
    def visible(self) -> bool:
        """Whether there is a bar on the terminal."""
        return not self._bar.disable

    def advance_to(self, step: int, *, loss: float | None = None) -> None:
        """Show `step` as done, and the newest loss that is known."""
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Take the bar away. Can be called twice."""
        self._bar.close()
