"""What loaders of indexed data and of streams have in common: all that the training loop knows of its data."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.components.data.mixture import SourceProgress
from trainer.components.data.prefetch import WaitClock, get_pin_device
from trainer.config.errors import UserError
from trainer.config.schema_training import DataloaderConfig


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is spread: sequences of a microbatch of a rank, of a step, ranks, and tokens of a sequence.

    Raises:
        ValueError: the global batch is no whole number of microbatches.
    """

    local_batch_size: int
    global_batch_size: int
    seq_len: int
    dp_rank: int = 0
    dp_degree: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_degree, f"dp_rank {self.dp_rank} of {self.dp_degree}"
        if self.global_batch_size < 1 or self.global_batch_size % self.microbatch_size:
            raise UserError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of training.local_batch_size "
                f"{self.local_batch_size} times {self.dp_degree} data-parallel ranks = {self.microbatch_size}"
            )

    @property
    def microbatch_size(self) -> int:
        """Sequences of one microbatch over all ranks."""
        return self.local_batch_size * self.dp_degree

    @property
    def microbatches_per_step(self) -> int:
        return self.global_batch_size // self.microbatch_size


class BatchLoader(ABC):
    """Hands out this rank's microbatches, made ahead of time in threads, and knows its place in the run.

    A batch is a dict of CPU tensors (pinned on request), (local_batch_size, seq_len) int64: `tokens`, `labels`, and
    `positions` where documents are masked.
    """

    def __init__(
        self,
        *,
        shape: BatchShape,
        identity: dict[str, Any],
        section: DataloaderConfig,
        device_type: str = "cpu",
        epoch_steps: int = -1,
    ) -> None:
        """Take what all loaders need.

        Args:
            shape: the batch, and this rank's part in it.
            identity: what the order of the data depends on: plain values, by name.
            section: threads, prefetch, pinned memory.
            device_type: where batches go.
            epoch_steps: batches after which `epoch_batches` stops; -1 for no limit.
        """
        self.shape = shape
        self._identity = identity
        self._section = section
        self._epoch_steps = epoch_steps
        self._pin_device = get_pin_device(pin_memory=section.pin_memory, device_type=device_type)
        self._sequences = 0
        self._clock = WaitClock()

    @property
    def sequences(self) -> int:
        """Sequences of the run handed out so far, over all ranks."""
        return self._sequences

    @property
    def microbatches_per_step(self) -> int:
        return self.shape.microbatches_per_step

    @property
    def fingerprint(self) -> str:
        """Identity of the order: equal fingerprints mean equal batches at every place (of a stream, on as many ranks)."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def take_wait_seconds(self) -> float:
        """Get the seconds that `next_batch` had to wait since the last call of this method."""
        return self._clock.take()

    @abstractmethod
    def next_batch(self) -> dict[str, torch.Tensor]:
        """Get the next microbatch of this rank. Raises what went wrong while it was made."""

    @abstractmethod
    def epoch_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches from the beginning of the data, as many on each rank; for validation. The place stays as it is."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Say where the next step begins, for the record."""

    @abstractmethod
    def describe(self, step: int | None = None) -> dict[str, SourceProgress]:
        """Sequences, tokens and epochs of each source, by name. step: after that many steps; None: at this point of the run."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The place after the batches handed out; batches made ahead do not count."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the place of `state`. Raises: ValueError where it is of another order."""

    @abstractmethod
    def close(self) -> None:
        """End the threads. A later `next_batch` starts them again."""
