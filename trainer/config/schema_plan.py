"""The section about planning a run without a GPU. See `schema.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PlanConfig:
    """What `job.plan` and `job.plan_search` plan for."""

    gpu: Literal["H200", "H100"] = "H200"
    """Kind of the GPUs, SXM both: how fast they are, and how much memory they have."""
    memory_gib: float | None = None
    """Memory of one GPU, in place of what its kind has."""
    world_size: int | None = None
    """Number of GPUs. Unset: those of the launch, NGPU times NNODES."""
    gpus_per_host: int = 8
    """GPUs that are joined by NVLink. Between hosts the network is slower."""
    search_seconds: int = 900
    """plan_search: how long to look. A layout takes some 15 seconds of a core, a pipeline two to four times that."""
    results: int = 8
    """plan_search: layouts that are listed."""
