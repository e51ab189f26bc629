"""How far a run has come."""

import dataclasses
from typing import Any

from trainer.components.nonfinite import NonFiniteGuard


@dataclasses.dataclass
class TrainState:
    """How far the run has come. Part of every checkpoint."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens_seen: int = 0
    """Tokens in the batches so far, over all ranks."""
    elapsed_seconds: float = 0.0
    """Time from the first step to the last checkpoint, without the time between a stop and a resume. The same on all ranks."""
    nonfinite: NonFiniteGuard | None = None
    """Counts steps that were left out."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        state: dict[str, Any] = {name: getattr(self, name) for name in ("step", "tokens_seen", "elapsed_seconds")}
        return state if self.nonfinite is None else {**state, "nonfinite": self.nonfinite.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counters. The first checkpoints had fewer."""
        self.step, self.tokens_seen = int(state["step"]), int(state["tokens_seen"])
        self.elapsed_seconds = float(state.get("elapsed_seconds", 0.0))
        if self.nonfinite is not None and "nonfinite" in state:
            self.nonfinite.load_state_dict(state["nonfinite"])
