"""What happens when loss or gradient is not finite, or the loss is a spike: warn, skip the step, roll back, or stop.

Where a step is to be left out the optimizer is told on the device, within the step, not to update. The host learns of it later: reading
the verdict at once would empty the GPU's queue at every step. The bound for spikes comes from losses that the host has read by then.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.components.host_copy import HostCopy
from trainer.components.loss_window import LossWindow
from trainer.components.poisoned import Kind, PoisonedBatches
from trainer.config.errors import RunError
from trainer.config.schema_training import TrainingConfig

logger = logging.getLogger(__name__)

Policy = Literal["off", "warn", "stop", "skip", "rollback"]


class NonFiniteError(RunError, RuntimeError):
    """Loss or gradient was not finite, or the loss a spike, and the policy says to stop."""


class RollBackError(RuntimeError):
    """The same, and the policy says to go back to the last checkpoint and leave the batch out."""


@dataclass
class _Verdict:
    step: int
    values: HostCopy  # loss, gradient norm
    bound: float  # of the loss
    batch: dict[str, Any]
    sequence: int


class NonFiniteGuard:
    """Decides on the device whether a step may update; reports and enforces the policy one step later.

    Every rank sees the same reduced loss and norm, so every rank decides alike and at the same step.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        max_skips: int,
        record_path: Path,
        is_writer: bool,
        spike_policy: Policy = "off",
        window: LossWindow | None = None,
    ) -> None:
        """max_skips: steps in a row. record_path: JSON lines, one for each bad step, written where `is_writer`."""
        self.policy = policy
        self.spike_policy = spike_policy
        self.max_skips = max_skips
        self.record_path = record_path
        self.is_writer = is_writer
        self.total_skipped = 0
        self.poisoned: PoisonedBatches | None = None
        """Set once ranks can talk to each other."""
        self._window = window or LossWindow(size=1, threshold=math.inf)
        self._in_a_row = 0
        self._rolled_back = 0
        self._pending: _Verdict | None = None

    def judge(self, step: int, *, loss: Tensor, grad_norm: Tensor, batch: dict[str, Any], sequence: int = 0) -> Tensor:
        """Return a 0-dim float32 tensor: 1 when the step must not update, else 0.

        loss, grad_norm: 0-dim, reduced over all ranks. batch: where the step's data came from, for the record. sequence:
        how many of the run came before it.
        """
        bound = math.inf if self.spike_policy == "off" else self._window.get_bound()
        is_good = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if self.spike_policy != "warn" and math.isfinite(bound):
            is_good &= loss <= bound
        self._pending = _Verdict(step, HostCopy(torch.stack([loss.float(), grad_norm.float()])), bound, batch, sequence)
        return torch.where(is_good, 0.0, 1.0)

    def settle(self) -> bool:
        """Act on the last judged step, waiting for its verdict if need be. Return whether that step was skipped.

        Raises:
            NonFiniteError: the policy is to stop, or too many steps in a row were skipped.
            RollBackError: the policy is to roll back.
        """
        verdict, self._pending = self._pending, None
        if verdict is None:
            return False
        loss, grad_norm = verdict.values.read()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_spike = is_finite and loss > verdict.bound
        if is_spike:
            logger.warning(
                "step %d: loss %.4f is a spike, above %.4f", verdict.step, loss, verdict.bound, extra={"same_on_all_ranks": True}
            )  # fmt: skip
        if is_finite and not (is_spike and self.spike_policy != "warn"):
            self._in_a_row = 0
            self._window.add(loss)
            return False
        self._write_down({"step": verdict.step, "loss": str(loss), "grad_norm": str(grad_norm), "batch": verdict.batch})
        self._enforce("spike" if is_spike else "nonfinite", verdict, f"loss {loss}, gradient norm {grad_norm}")
        return True

    def _enforce(self, kind: Kind, verdict: _Verdict, values: str) -> None:
        """Skip a bad step, or raise."""
        policy = self._get_policy(kind)
        failures = 1 if self.poisoned is None else self.poisoned.add(verdict.sequence, kind)
        where = f"step {verdict.step}: {values}; no rank updated. Batch: {verdict.batch}"
        if policy == "stop":
            again = f" It failed here {failures} times: the cause will not pass by itself." if failures > 1 else ""
            raise NonFiniteError(
                f"{where}. The record is in {self.record_path}.{again} To go on with the next batch instead, "
                "set training.nonfinite_policy = 'skip' (for spikes: training.spike_policy)"
            )
        if policy == "rollback" and self._rolled_back < self.max_skips:
            self._rolled_back += 1
            raise RollBackError(where)
        self._count_skip(where if policy == "skip" else f"{where}. {self._rolled_back} rollbacks did not help")
        logger.warning("Skipped %s", where, extra={"same_on_all_ranks": True})

    def _get_policy(self, kind: Kind) -> Policy:
        return self.spike_policy if kind == "spike" else self.policy

    def _find_policy(self, sequence: int) -> Policy | None:
        """Return the policy for what was wrong with a batch. None: nothing was."""
        kind = None if self.poisoned is None else self.poisoned.find_kind(sequence)
        return None if kind is None else self._get_policy(kind)

    def passes_over(self, sequence: int) -> bool:
        """Return whether to leave out a batch unseen: training failed there before, and the policy says to go on without it."""
        return self._find_policy(sequence) in ("skip", "rollback")

    def pass_over(self, step: int) -> None:
        """Count a step whose batch was left out unseen.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
        """
        self._count_skip(f"step {step}: its batch is known to be bad")
        logger.warning(
            "Passed over step %d, at whose batch training failed before", step, extra={"same_on_all_ranks": True}
        )

    def refuse_hopeless(self, sequence: int) -> None:
        """Stop a run that was restarted by itself before it fails at a batch for the third time.

        Raises:
            NonFiniteError: such a batch is ahead, and the policy is to stop.
        """
        hopeless = [] if self.poisoned is None else self.poisoned.list_hopeless(sequence)
        first = next((each for each in hopeless if self._find_policy(each) == "stop"), None)
        if first is not None and self.poisoned is not None:
            raise NonFiniteError(
                f"training has failed twice at the batch from sequence {first} on, and is not restarted for a third time. "
                f"Set training.nonfinite_policy = 'skip' to leave it out, or start by hand to try again ({self.poisoned.path})"
            )

    def _count_skip(self, where: str) -> None:
        self.total_skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{where}. {self._in_a_row} steps in a row were skipped and "
                f"training.nonfinite_max_skips = {self.max_skips}: the weights are probably lost, "
                "resume from an earlier checkpoint with a lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of skipped steps and the window of losses, once the last judged step is settled."""
        return {
            "total_skipped": self.total_skipped, "in_a_row": self._in_a_row, "window": self._window.state_dict()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting: steps that a run skips again and again across restarts still stop it."""
        self.total_skipped, self._in_a_row = int(state["total_skipped"]), int(state["in_a_row"])
        self._window.load_state_dict(state.get("window", ()))
        self._pending = None

    def _write_down(self, record: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        try:
            with self.record_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            # Raised here it would end this rank alone, and leave the others to a timeout. The log has the record too.
            logger.warning("%s: %s. The record is %s", self.record_path, error, record)


def build_nonfinite_guard(*, training: TrainingConfig, streams: bool, dump_folder: Path, rank: int) -> NonFiniteGuard:
    """Return the guard of this rank. streams: each rank has a place in the data of its own, and a record; else all have the same."""
    return NonFiniteGuard(
        policy=training.nonfinite_policy,
        spike_policy=training.spike_policy,
        window=LossWindow(size=training.spike_window, threshold=training.spike_threshold),
        max_skips=training.nonfinite_max_skips,
        record_path=dump_folder / (f"nonfinite.rank_{rank}.jsonl" if streams else "nonfinite.jsonl"),
        is_writer=streams or rank == 0,
    )
