"""Checkpoints of a run on a GPU: copies that overlap with training, pinned memory that is used again, random numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from trainer.components.checkpoint import CheckpointManager
from trainer.components.optimizer import build_optimizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import OptimizerConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SECTION = CheckpointConfig(enable=True, interval=2, keep_latest_k=0)
MODES = ("disabled", "async", "async_with_pinned_mem")
WIDTH = 512


class Center(nn.Module):
    """Subtracts a running mean: a buffer that each forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.detach().mean(dim=0), 0.1)
        return x - self.mean


class Run:
    """A small run whose steps draw random numbers on the GPU, and whose work is queued there without a wait."""

    def __init__(self, folder: Path, mode: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH), Center(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = build_optimizer(self.model, section=OptimizerConfig(lr=0.01))
        states = {"model": self.model, "optimizer": self.optimizer}
        section = replace(SECTION, async_mode=mode)  # type: ignore[arg-type]
        self.manager = CheckpointManager(states, section=section, folder=folder)

    def train(self, first: int, last: int) -> None:
        """Take steps `first` to `last`, and save where it is due."""
        for step in range(first, last + 1):
            x = torch.rand(4096, WIDTH, device="cuda")
            self.model(x).square().mean().backward()
            self.manager.maybe_wait_for_staging()
            self.optimizer.step(torch.zeros((), device="cuda"))
            self.optimizer.zero_grad()
            self.manager.save(step)

    def take(self) -> dict[str, torch.Tensor]:
        named = {**self.model.state_dict(), **self.optimizer.state_dict(), "rng": torch.cuda.get_rng_state()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.mark.parametrize("mode", MODES)
def test_run_goes_on_bitwise_from_each_checkpoint(tmp_path: Path, mode: str) -> None:
    """Several saves in a row: the second finds the memory of the first, and training goes on under each of them."""
    run = Run(tmp_path, mode)
    run.train(1, 8)
    run.manager.wait()
    expected = run.take()
    run.manager.close()
    for step in (2, 4, 6):
        other = Run(tmp_path, mode)
        assert other.manager.load(step) == step
        other.train(step + 1, 8)
        other.manager.wait()
        actual = other.take()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == [], f"from step {step}"
        other.manager.close()


def test_tensors_are_copied_to_pinned_memory_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    stage = StateDictStager.stage

    def record(self, *args, **kwargs):
        copies.append(stage(self, *args, **kwargs))
        return copies[-1]

    monkeypatch.setattr(StateDictStager, "stage", record)
    run = Run(tmp_path, "async_with_pinned_mem")
    run.train(1, 6)
    run.manager.wait()
    assert len(copies) == 3
    weights = [copy["model"]["0.weight"] for copy in copies]
    assert all(weight.is_pinned() for weight in weights)
    assert len({weight.data_ptr() for weight in weights}) == 1
    run.manager.close()
