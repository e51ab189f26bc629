"""What happens when a loss or a gradient is not finite: nothing is updated, it is written down, the run stops or goes on.

The optimizer is told on the device, within the step, not to update. The host learns of it later: reading the verdict at once would
empty the GPU's queue at every step.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.components.host_copy import HostCopy

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite, and the policy says to stop."""


@dataclass
class _Verdict:
    step: int
    values: HostCopy  # skip, loss, gradient norm
    batch: dict[str, Any]


class NonFiniteGuard:
    """Decides on the device whether a step may update; reports and enforces the policy one step later.

    Every rank sees the same reduced loss and norm, so every rank decides alike and at the same step.
    """

    def __init__(self, *, policy: Literal["stop", "skip"], max_skips: int, record_path: Path, is_writer: bool) -> None:
        """max_skips: steps in a row. record_path: JSON lines, one for each bad step, written where `is_writer`."""
        self.policy = policy
        self.max_skips = max_skips
        self.record_path = record_path
        self.is_writer = is_writer
        self.total_skipped = 0
        self._in_a_row = 0
        self._pending: _Verdict | None = None

    def judge(self, step: int, *, loss: Tensor, grad_norm: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return a 0-dim float32 tensor: 1 when the step must not update, else 0.

        loss, grad_norm: 0-dim, reduced over all ranks. batch: where the step's data came from, for the record.
        """
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        skip = torch.where(finite, 0.0, 1.0)
        self._pending = _Verdict(step, HostCopy(torch.stack([skip, loss.float(), grad_norm.float()])), batch)
        return skip

    def settle(self) -> bool:
        """Act on the last judged step, waiting for its verdict if need be. Return whether that step was skipped.

        Raises:
            NonFiniteError: the policy is to stop, or too many steps in a row were skipped.
        """
        verdict, self._pending = self._pending, None
        if verdict is None:
            return False
        skip, loss, grad_norm = verdict.values.read()
        if not skip:
            self._in_a_row = 0
            return False
        self.total_skipped += 1
        self._in_a_row += 1
        self._write_down({"step": verdict.step, "loss": str(loss), "grad_norm": str(grad_norm), "batch": verdict.batch})
        where = f"step {verdict.step}: loss {loss}, gradient norm {grad_norm}; no rank updated. Batch: {verdict.batch}"
        if self.policy == "stop":
            raise NonFiniteError(
                f"{where}. The record is in {self.record_path}. To go on with the next batch instead, "
                "set training.nonfinite_policy = 'skip'"
            )
        if self._in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{where}. {self._in_a_row} steps in a row were skipped and "
                f"training.nonfinite_max_skips = {self.max_skips}: the weights are probably lost, "
                "resume from an earlier checkpoint with a lower learning rate"
            )
        logger.warning("Skipped %s", where, extra={"same_on_all_ranks": True})
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the counts of skipped steps, once the last judged step is settled."""
        return {"total_skipped": self.total_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting: steps that a run skips again and again across restarts still stop it."""
        self.total_skipped, self._in_a_row = int(state["total_skipped"]), int(state["in_a_row"])

    def _write_down(self, record: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        try:
            with self.record_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            # Raised here it would end this rank alone, and leave the others to a timeout. The log has the record too.
            logger.warning("%s: %s. The record is %s", self.record_path, error, record)
