"""The loader of indexed data: every batch is a pure function of its place in the run.

The sequences of a run are numbered over all ranks. An optimizer step takes the next `global_batch_size` of them, in
microbatches of `local_batch_size * dp_degree`, of which each rank takes its contiguous slice. Which sequences a step
trains on therefore depends on neither the number of ranks nor the size of a microbatch nor the number of threads, and
the whole state is the number of sequences consumed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.components.data.batch_loader import BatchLoader, BatchShape
from trainer.components.data.mixture import Mixture, MixtureSource, SourceProgress
from trainer.components.data.packing import Packing
from trainer.components.data.prefetch import DEFAULT_PREFETCH_FACTOR, Prefetcher, to_tensors
from trainer.components.loss import IGNORE_INDEX
from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

# Part of every state. Raise it with any change of the order of sequences, so that no old run is resumed in a new order.
ORDER_VERSION = 1
STATE_KEYS = ("sequences", "fingerprint", "identity", "global_batch_size")


@dataclass(frozen=True)
class Source:
    """One source of a loader: packed sequences, and how often they are drawn relative to the other sources."""

    name: str
    packing: Packing
    fingerprint: str
    weight: float = 1.0


class DataLoader(BatchLoader):
    """The loader of token files: any batch can be made at any time.

    Args:
        sources: at least one, with sequences of `shape.seq_len` tokens.
        seed: seed of the run.
        shuffle: a new random order each epoch; without it the order of the data.
        packing: name of the packing, for the identity of the order.
        shape, section, device_type, epoch_steps: see `BatchLoader`.

    Raises:
        ValueError: a source is empty or the mixture impossible.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        shuffle: bool,
        packing: str,
        shape: BatchShape,
        **options: Any,
    ) -> None:
        identity = {
            "data": [source.fingerprint for source in sources],
            "mixture": [source.weight for source in sources],
            "seq_len": shape.seq_len,
            "packing": packing,
            "seed": seed,
            "shuffle": shuffle,
            "order_version": ORDER_VERSION,
        }
        super().__init__(shape=shape, identity=identity, **options)
        self._packings = [source.packing for source in sources]
        self._mixture = Mixture(
            [MixtureSource(s.name, s.packing.n_sequences, s.weight, s.fingerprint) for s in sources],
            seed=seed,
            shuffle=shuffle,
        )
        self._prefetcher: Prefetcher | None = None

    @property
    def n_sequences(self) -> int:
        """Sequences of all sources together, in one pass over each."""
        return sum(packing.n_sequences for packing in self._packings)

    def next_batch(self) -> dict[str, torch.Tensor]:
        """Get the next microbatch of this rank.

        Raises:
            whatever went wrong in the thread that made this batch.
        """
        if self._prefetcher is None:
            self._prefetcher = self._start(self._sequences)
        try:
            with self._clock:
                batch = self._prefetcher.get()
        except BaseException:
            self.close()  # what was made ahead belongs to later places
            raise
        self._sequences += self.shape.microbatch_size
        return batch

    def batch(self, step: int, microbatch: int = 0) -> dict[str, torch.Tensor]:
        """Make a microbatch of this rank at any step (from 0), without moving on."""
        assert 0 <= microbatch < self.microbatches_per_step, f"microbatch {microbatch} of {self.microbatches_per_step}"
        return self._make(step * self.shape.global_batch_size + microbatch * self.shape.microbatch_size)

    def position(self) -> dict[str, Any]:
        """Say what the next step trains on, for the record; `locate` names the sequences."""
        return {"first_sequence": self._sequences, "sequences": self.shape.global_batch_size}

    def locate(self, first: int, count: int) -> list[dict[str, Any]]:
        """Name the sequences [first, first + count) of the run: source, epoch, and sequence in that source.

        With `position` before a step, this says what the step trained on.
        """
        places = np.arange(first, first + count)
        columns = (*self._mixture.locate(places), self._mixture.epochs(places))
        return [
            {"source": self._mixture.sources[source].name, "epoch": epoch, "sequence": sequence}
            for source, sequence, epoch in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def describe(self, step: int | None = None) -> dict[str, SourceProgress]:
        """Sequences, tokens and epochs of each source, by name.

        Args:
            step: after that many steps of the present global batch size; None: at this point of the run.
        """
        consumed = self._sequences if step is None else step * self.shape.global_batch_size
        return self._mixture.describe(consumed, seq_len=self.shape.seq_len)

    def epoch_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Walk over all sequences once, source by source in the order of the data; for validation.

        Every rank yields the same number of batches. Where sequences run out, a batch is filled up with rows in which
        all labels are IGNORE_INDEX, so that each sequence counts once. Leaves the state of the loader alone.
        """
        count = self.n_epoch_batches
        prefetcher = self._prefetch(self._make_in_order, count=count)
        try:
            for _ in range(count):
                with self._clock:
                    batch = prefetcher.get()
                yield batch
        finally:
            prefetcher.close()

    @property
    def n_epoch_batches(self) -> int:
        """Number of batches that `epoch_batches` yields on each rank."""
        whole = -(-self.n_sequences // self.shape.microbatch_size)
        return whole if self._epoch_steps < 0 else min(whole, self._epoch_steps)

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches handed out; batches made ahead do not count. The same on all ranks."""
        return {
            "sequences": self._sequences,
            "fingerprint": self.fingerprint,
            "identity": self._identity,
            "global_batch_size": self.shape.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the place of `state`, whatever the number of ranks, threads or microbatches.

        A changed global batch size is fine: sequences are counted, not steps, so none is skipped or repeated.

        Raises:
            ValueError: the order of sequences is another one; the message names what differs.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise UserError(
                f"the checkpoint's data position has no {', '.join(missing)}: it is not one of an indexed data set. "
                "Was data.streaming changed? To begin the data anew: "
                'checkpoint.exclude_from_loading = ["dataloader"]'
            )
        if state["fingerprint"] != self.fingerprint:
            raise UserError(_explain_difference(state["identity"], self._identity))
        if state["global_batch_size"] != self.shape.global_batch_size:
            logger.warning(
                "training.global_batch_size was %d and is %d: the data go on after sequence %d, where they stopped",
                state["global_batch_size"],
                self.shape.global_batch_size,
                state["sequences"],
                extra={"same_on_all_ranks": True},
            )
        self.close()
        self._sequences = int(state["sequences"])

    def close(self) -> None:
        """End the threads. A later `next_batch` starts them again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _start(self, first: int) -> Prefetcher:
        size = self.shape.microbatch_size
        return self._prefetch(lambda number: self._make(first + number * size))

    def _prefetch(self, produce: Callable[[int], dict[str, torch.Tensor]], count: int | None = None) -> Prefetcher:
        workers = max(self._section.num_workers, 1)
        factor = self._section.prefetch_factor or DEFAULT_PREFETCH_FACTOR
        return Prefetcher(produce, workers=workers, depth=workers * factor, count=count, device_index=self._pin_device)

    def _make(self, first: int) -> dict[str, torch.Tensor]:
        """Make this rank's part of the microbatch that begins at sequence `first` of the run."""
        places = first + self._rows()
        return self._fetch(*self._mixture.locate(places))

    def _make_in_order(self, number: int) -> dict[str, torch.Tensor]:
        """Make this rank's part of batch `number` of one pass over all sources."""
        places = number * self.shape.microbatch_size + self._rows()
        missing = places >= self.n_sequences
        places = np.minimum(places, self.n_sequences - 1)
        ends = np.cumsum([packing.n_sequences for packing in self._packings])
        source = np.searchsorted(ends, places, side="right")
        first = ends - np.array([packing.n_sequences for packing in self._packings])
        batch = self._fetch(source, places - first[source])
        batch["labels"][torch.from_numpy(missing)] = IGNORE_INDEX
        return batch

    def _rows(self) -> np.ndarray:
        local = self.shape.local_batch_size
        return np.arange(self.shape.dp_rank * local, (self.shape.dp_rank + 1) * local)

    def _fetch(self, source: np.ndarray, sequence: np.ndarray) -> dict[str, torch.Tensor]:
        """Make sequences (k,) of sources (k,) into a batch of k rows, in that order."""
        present = np.unique(source).tolist()
        if len(present) == 1:
            return to_tensors(self._packings[present[0]].fetch(sequence), pin=self._pin_device is not None)
        arrays: dict[str, np.ndarray] = {}
        for index in present:
            rows = np.flatnonzero(source == index)
            for name, values in self._packings[index].fetch(sequence[rows]).items():
                if name not in arrays:
                    arrays[name] = np.empty((len(source), values.shape[1]), dtype=values.dtype)
                arrays[name][rows] = values
        return to_tensors(arrays, pin=self._pin_device is not None)


# What in the identity of the order the user set, and how it is called in the configuration.
_KEYS = {
    "data": "the data themselves (training.dataset, training.dataset_path, data.sources, or the tokenizer)",
    "mixture": "the weights in data.sources",
    "seq_len": "training.seq_len",
    "packing": "data.packing",
    "seed": "debug.seed",
    "shuffle": "data.shuffle",
    "order_version": "the order of this program's version",
}


def _explain_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    changes = []
    for key, name in _KEYS.items():
        old, new = before.get(key), now[key]
        if old == new:
            continue
        changes.append(f"{name}: {_shorten(old)} in the checkpoint, {_shorten(new)} now")
    return (
        "the checkpoint was made with another order of data, so its position means nothing here. What changed: "
        + "; ".join(changes)
        + '. Put it back, or begin the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
    )


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shorten(item) for item in value) + "]"
    return value[:12] if isinstance(value, str) else str(value)
