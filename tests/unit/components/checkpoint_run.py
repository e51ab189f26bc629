"""A tiny run with everything that a checkpoint holds, for the tests of checkpoints in one process."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.components.checkpoint import CheckpointManager
from trainer.components.lr_scheduler import build_lr_scheduler
from trainer.components.optimizer import build_optimizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import LRSchedulerConfig, OptimizerConfig

SECTION = CheckpointConfig(enable=True, interval=2, keep_latest_k=0)
MODES = ("disabled", "async", "async_with_pinned_mem")


class Counters:
    """A plain state."""

    def __init__(self) -> None:
        self.values: dict = {"step": 0, "notes": ["a", {"b": None}]}

    def state_dict(self) -> dict:
        return dict(self.values)

    def load_state_dict(self, state: dict) -> None:
        self.values = state


class Run:
    """A tiny run with everything that a checkpoint holds. Its steps draw from every generator."""

    def __init__(
        self,
        folder: Path,
        section: CheckpointConfig = SECTION,
        *,
        width: int = 4,
        seed: int = 0,
        settings: dict | None = None,
        is_restart: bool = False,
        **optimizer,
    ):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
        self.optimizer = build_optimizer(self.model, section=OptimizerConfig(lr=0.01, **optimizer))
        self.lr_scheduler = build_lr_scheduler(self.optimizer, section=LRSchedulerConfig(warmup_steps=3), steps=20)
        self.counters = Counters()
        states = {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_state": self.counters,
        }
        self.manager = CheckpointManager(
            states, section=section, folder=folder, settings=settings, is_restart=is_restart
        )

    def step(self, count: int = 1, save: bool = True) -> list[float]:
        losses = []
        for _ in range(count):
            noise = random.random() + np.random.rand() + np.random.standard_normal()
            x = torch.rand(8, self.model[0].in_features) + noise
            loss = nn.functional.dropout(self.model(x), 0.3).square().mean()
            loss.backward()
            self.manager.maybe_wait_for_staging()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            self.counters.values["step"] += 1
            losses.append(loss.item())
            if save:
                self.manager.save(self.counters.values["step"])
        return losses


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
