"""The learning rate as a pure function of the step: linear warm-up, a stable part, decay.

Cosine and linear schedules are this one without a stable part (`decay_ratio` unset); with `decay_ratio` it is
warmup-stable-decay (Hu et al., 2024, https://arxiv.org/abs/2404.06395, section 4). Boundaries are those of torchtitan.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from trainer.components.optimizer import Optimizers
from trainer.config.schema_training import LRSchedulerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rate at every step. Lengths are in optimizer steps."""

    warmup_steps: int
    """The factor rises as 1/n, 2/n, ..., 1 over the first n steps."""
    stable_steps: int
    """The factor is 1."""
    decay_steps: int
    """The factor falls; it would reach `min_lr_factor` in the last of them."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    min_lr_factor: float = 0.0

    def lr_factor(self, step: int) -> float:
        """Return the factor for optimizer step `step`, counted from 0. After the schedule's end it stays at the minimum."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decayed = step + 1 - self.warmup_steps - self.stable_steps
        if decayed <= 0:
            return 1.0
        progress = min(1.0, decayed / self.decay_steps) if self.decay_steps else 1.0
        remaining = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.decay_type]
        return self.min_lr_factor + (1 - self.min_lr_factor) * remaining


class LRScheduler:
    """Sets the learning rate of every parameter group: its own peak (`initial_lr`) times the schedule's factor.

    The only state is the number of steps taken. A resumed run has the rates that the uninterrupted one would have had;
    if the schedule was changed in between, it has those of the new schedule at that step.
    """

    def __init__(self, optimizers: Optimizers, schedule: Schedule) -> None:
        self._optimizers = optimizers
        self._schedule = schedule
        self._set(0)

    def step(self) -> None:
        """Go on to the next step's learning rate. Call it after the optimizer's step, a skipped one included."""
        self._set(self._steps_taken + 1)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate that the next optimizer step uses, for each parameter group."""
        return [group["lr"] for group in self._optimizers.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken."""
        return {"steps_taken": self._steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a step."""
        self._set(int(state_dict["steps_taken"]))

    def _set(self, steps_taken: int) -> None:
        self._steps_taken = steps_taken
        factor = self._schedule.lr_factor(steps_taken)
        for group in self._optimizers.param_groups:
            group["lr"] = group["initial_lr"] * factor


def build_schedule(section: LRSchedulerConfig, *, steps: int) -> Schedule:
    """Return the schedule for a run of `steps` optimizer steps.

    The decay is cut to what the warm-up leaves. It is laid out over one step more than there are, so that the rate of
    the last step is not yet the minimum (a step at a rate of 0 would be wasted).
    """
    total = section.total_steps or steps
    warmup = section.warmup_steps
    if warmup > total:
        logger.warning(
            "lr_scheduler.warmup_steps = %d is longer than the schedule of %d steps: it warms up over all of them and never "
            "decays.", warmup, total, extra={"same_on_all_ranks": True},
        )  # fmt: skip
        warmup = total
    decay = total - warmup if section.decay_ratio is None else round(total * section.decay_ratio)
    if warmup + decay > total:
        logger.warning(
            "lr_scheduler: warm-up (%d steps) and decay (decay_ratio = %g, %d steps) are longer than the schedule of %d steps: "
            "the decay is cut to %d steps.", warmup, section.decay_ratio, decay, total, total - warmup,
            extra={"same_on_all_ranks": True},
        )  # fmt: skip
        decay = total - warmup
    return Schedule(warmup, total + 1 - warmup - decay, decay, section.decay_type, section.min_lr_factor)


def build_lr_scheduler(optimizers: Optimizers, *, section: LRSchedulerConfig, steps: int) -> LRScheduler:
    """Build the scheduler and set the first learning rate. steps: `training.steps`, for when no `total_steps` is set."""
    return LRScheduler(optimizers, build_schedule(section, steps=steps))
