"""The progress bar of a run."""

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
        self._bar = tqdm(
            total=total,
            initial=initial,
            disable=not (enabled and sys.stderr.isatty()),
            desc="training",
            unit="step",
            dynamic_ncols=True,
            leave=False,
            smoothing=0.05,
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
