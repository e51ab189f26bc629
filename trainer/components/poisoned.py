"""Batches at which training failed, remembered across restarts, so that a run does not fail at the same one for ever."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from trainer.components.data.batch_loader import BatchLoader
from trainer.components.durable_files import write_text

logger = logging.getLogger(__name__)

POISONED_FILE = "poisoned.json"

Kind = Literal["nonfinite", "spike"]


class PoisonedBatches:
    """The batches of a run that were not finite, or a spike, by the number of sequences before them.

    The first rank reads and writes `poisoned.json`; all know the same. It is about one order of data and one size of batches;
    entries of another are dropped.
    """

    def __init__(self, folder: Path, loader: BatchLoader) -> None:
        """Collective. loader: that of the run's batches."""
        self.path = folder / POISONED_FILE
        self._identity = {"fingerprint": loader.fingerprint, "batch_size": loader.shape.global_batch_size}
        self._is_writer = not dist.is_initialized() or dist.get_rank() == 0
        found: list[dict[int, tuple[Kind, int]]] = [self._read() if self._is_writer else {}]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        self._failures = found[0]

    def find_kind(self, sequence: int) -> Kind | None:
        """Return what was last wrong with the batch that begins at this sequence of the run. None: nothing."""
        return self._failures[sequence][0] if sequence in self._failures else None

    def list_hopeless(self, sequence: int) -> list[int]:
        """Return the batches from `sequence` on at which training has failed twice or more."""
        return sorted(first for first, (_, count) in self._failures.items() if first >= sequence and count > 1)

    def add(self, sequence: int, kind: Kind) -> int:
        """Note that training failed at a batch. Return how often it has by now."""
        count = self._failures.get(sequence, (kind, 0))[1] + 1
        self._failures[sequence] = kind, count
        if self._is_writer:
            self._write()
        return count

    def _read(self) -> dict[int, tuple[Kind, int]]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if {key: content[key] for key in self._identity} == self._identity:
                return {int(it["first_sequence"]): (it["kind"], int(it["failures"])) for it in content["batches"]}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s: %s), and is begun anew", self.path, type(error).__name__, error)
        return {}

    def _write(self) -> None:
        batches = [
            {"first_sequence": first, "kind": kind, "failures": count}
            for first, (kind, count) in sorted(self._failures.items())
        ]
        draft = self.path.with_name(f".{POISONED_FILE}")
        try:
            write_text(draft, json.dumps({**self._identity, "batches": batches}, indent=1))
            draft.replace(self.path)
        except OSError as error:
            logger.warning("%s could not be written: %s", self.path, error)
