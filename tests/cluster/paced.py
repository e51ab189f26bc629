"""The user's module of the tests, with an optimizer that takes its time until the run was interrupted once.

So an interruption finds the run half way on a machine of any speed, and what comes after it takes no longer than it must.
"""

import os
import time

import torch

from tests.distributed import user_module
from trainer.components.optimizer import TrainedParameter, group_parameters, register_optimizer
from trainer.config.schema_training import OptimizerConfig

SECONDS = float(os.environ.get("PACE_SECONDS", "0")) if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0.0

assert user_module.TINY, "imported for what it registers"


class PacedAdamW(torch.optim.AdamW):
    """AdamW that sleeps before each step."""

    def step(self, closure=None):
        """Take a step after a nap."""
        time.sleep(SECONDS)
        return super().step(closure)


def build_paced(parameters: list[TrainedParameter], section: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW that sleeps before each step."""
    groups = group_parameters(parameters, lr=section.lr, weight_decay=section.weight_decay)
    return PacedAdamW(groups, lr=section.lr, betas=(section.beta1, section.beta2), eps=section.eps)


register_optimizer("PacedAdamW", build_paced)
