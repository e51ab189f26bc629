"""What is known of a process before torch is."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the launcher and the environment say about this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    is_restart: bool = False
    """Whether a launcher or SLURM has started it again by itself."""
    ends_at: float | None = None
    """When the time of this process is over, on the clock of `time.monotonic`. None: not limited, or another rank keeps it."""
    wandb_variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
