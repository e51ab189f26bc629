"""The checkpoint manager over several ranks: exact resume, other meshes, and death in the middle of a save."""

import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.harness import RankFailedError, run_distributed
from trainer.components import checkpoint_checksums as checksums
from trainer.components import checkpoint_files as files
from trainer.components.checkpoint import CheckpointManager
from trainer.components.lr_scheduler import build_lr_scheduler
from trainer.components.optimizer import build_optimizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import LRSchedulerConfig, OptimizerConfig

SECTION = CheckpointConfig(enable=True, interval=2, keep_latest_k=0)
MODES = ("disabled", "async", "async_with_pinned_mem")
WIDTH = 7  # not a multiple of 2 or 4: shards are uneven


class Position:
    """A plain state: the same on all ranks, or each rank's own."""

    def __init__(self, own: bool = False) -> None:
        self.own = own
        self.value = 0

    def state_dict(self) -> dict:
        return {"value": self.value, **({"rank": dist.get_rank()} if self.own else {})}

    def load_state_dict(self, state: dict) -> None:
        assert state.get("rank", dist.get_rank()) == dist.get_rank(), "this is another rank's state"
        self.value = state["value"]


class Run:
    """A sharded run whose losses depend on each rank's generators."""

    def __init__(
        self, folder: str, section: CheckpointConfig, seed: int = 0, optimizer: str = "AdamW", own: bool = False
    ):
        torch.manual_seed(seed)
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        for layer in self.model:
            fully_shard(layer)
        fully_shard(self.model)
        torch.manual_seed(100 * seed + dist.get_rank())
        random.seed(100 * seed + dist.get_rank())
        self.optimizer = build_optimizer(self.model, section=OptimizerConfig(name=optimizer, lr=0.01))
        self.lr_scheduler = build_lr_scheduler(self.optimizer, section=LRSchedulerConfig(warmup_steps=3), steps=20)
        self.position = Position(own)
        states = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "dataloader": self.position}  # fmt: skip
        self.manager = CheckpointManager(states, section=section, folder=Path(folder), timeout_seconds=20)

    def step(self, count: int = 1, save: bool = True) -> list[float]:
        losses = []
        for _ in range(count):
            loss = (self.model(torch.rand(4, WIDTH)) * random.random()).square().mean()
            loss.backward()
            self.manager.maybe_wait_for_staging()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            self.position.value += 1
            losses.append(loss.item())
            if save:
                self.manager.save(self.position.value)
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {**dict(self.model.named_parameters()), **self.optimizer.state_dict()}
        return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in named.items()}


def save_and_resume(folder: str, section: CheckpointConfig, optimizer: str) -> tuple[list[float], list[float]]:
    """Return the losses of six steps without a stop, and of the same cut in three."""
    whole = Run(folder + "/whole", section, optimizer=optimizer).step(6, save=False)
    first = Run(folder + "/cut", section, optimizer=optimizer)
    losses = first.step(2)
    first.step(1)  # lost; overlaps with the writing
    first.manager.close()
    dist.barrier()
    for start in (2, 4):
        resumed = Run(folder + "/cut", section, seed=7, optimizer=optimizer)
        assert resumed.manager.load() == start
        losses += resumed.step(2)
        resumed.manager.wait()
        resumed.manager.close()
    return whole, losses


@pytest.mark.parametrize(("mode", "optimizer"), [*((mode, "AdamW") for mode in MODES), ("async", "Muon")])
def test_resume_goes_on_bitwise_on_every_rank(tmp_path, mode, optimizer):
    section = replace(SECTION, async_mode=mode)
    results = run_distributed(save_and_resume, 2, str(tmp_path), section, optimizer)
    assert results[0][0] != results[1][0]
    for whole, resumed in results:
        assert resumed == whole
    assert files.list_steps(tmp_path / "cut") == [2, 4, 6]


def train_and_save(folder: str, section: CheckpointConfig, own: bool, count: int = 2) -> dict[str, torch.Tensor]:
    run = Run(folder, section, own=own)
    run.step(count)
    run.manager.close()
    return run.tensors()


def load_tensors(folder: str, section: CheckpointConfig, own: bool) -> tuple[int | None, int, dict[str, torch.Tensor]]:
    run = Run(folder, section, seed=3, own=own)
    return run.manager.load(), run.position.value, run.tensors()


@pytest.mark.parametrize(("world_before", "world_after"), [(4, 2), (2, 4), (2, 1)])
def test_load_on_another_number_of_ranks_is_bit_exact(tmp_path, world_before, world_after):
    saved = run_distributed(train_and_save, world_before, str(tmp_path), SECTION, False)[0]
    for step, position, loaded in run_distributed(load_tensors, world_after, str(tmp_path), SECTION, False):
        assert (step, position) == (2, 2)
        assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []


def test_states_that_differ_by_rank_return_to_their_ranks_and_are_not_divided(tmp_path):
    run_distributed(train_and_save, 2, str(tmp_path), SECTION, True)
    assert [result[:2] for result in run_distributed(load_tensors, 2, str(tmp_path), SECTION, True)] == [(2, 2), (2, 2)]
    with pytest.raises(RankFailedError, match="dataloader was saved by 2 processes"):
        run_distributed(load_tensors, 1, str(tmp_path), SECTION, True)


def save_and_die(folder: str, section: CheckpointConfig, victim: int, where: str) -> None:
    """Save step 2, then be killed while step 4 (or step 2 anew) is saved."""
    run = Run(folder, section)
    run.step(2)
    run.manager.wait()

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == victim:
        if where == "writing":
            dcp.FileSystemWriter.write_data = die
        elif where == "index":
            dcp.FileSystemWriter.finish = die
        else:
            files.commit = die
    run.step(2) if where != "again" else run.manager.save(2)
    run.manager.close()


@pytest.mark.parametrize(
    ("mode", "victim", "where"),
    [
        ("disabled", 1, "writing"),
        ("disabled", 0, "index"),
        ("disabled", 0, "commit"),
        ("disabled", 0, "again"),
        ("async", 0, "writing"),
        ("async_with_pinned_mem", 0, "commit"),
    ],
)
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, mode, victim, where):
    section = replace(SECTION, async_mode=mode)
    with pytest.raises(RankFailedError):
        run_distributed(save_and_die, 2, str(tmp_path), section, victim, where, timeout=30)
    leftovers = {path.name for path in tmp_path.iterdir()} - {"step-2"}
    # When rank 0 outlives the other it clears up itself.
    assert leftovers == {0: {".step-2.staging" if where == "again" else ".step-4.staging"}, 1: set()}[victim]
    reference = run_distributed(train_and_save, 2, str(tmp_path.with_name("reference")), SECTION, False)[0]
    for step, position, loaded in run_distributed(load_tensors, 2, str(tmp_path), SECTION, False):
        assert (step, position) == (2, 2)
        assert [name for name in reference if not torch.equal(loaded[name], reference[name])] == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def save_with_an_error_on_one_rank(folder: str, section: CheckpointConfig, where: str) -> str:
    """Return what each rank is told when one cannot write, or cannot give its state."""
    run = Run(folder, section)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        if where == "writing":
            dcp.FileSystemWriter.write_data = fail
        else:
            run.position.state_dict = fail
    try:
        run.step(2)
        run.manager.wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["writing", "collecting"])
def test_error_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path, mode, where):
    section = replace(SECTION, async_mode=mode, max_failed_saves=0)
    messages = run_distributed(save_with_an_error_on_one_rank, 2, str(tmp_path), section, where)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]
    assert "No space left on device" in messages[0]
    assert list(tmp_path.iterdir()) == []


def fail_and_go_on(folder: str) -> list[int]:
    """Rank 1 cannot write for two saves, and training goes on; return the steps that are there after each save."""
    run = Run(folder, replace(SECTION, async_mode="async", interval=1, max_failed_saves=2))
    assert run.manager._writer_ranks.group is not run.manager._ranks.group, "two threads on one group would mix"
    write, there = dcp.FileSystemWriter.write_data, []

    def fail_at_first(*args, **kwargs):
        if run.position.value in (1, 2):
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    if dist.get_rank() == 1:
        dcp.FileSystemWriter.write_data = fail_at_first
    for _ in range(4):
        run.step(1)
        run.manager.wait()
        there.append(len(files.list_steps(Path(folder))))
        dist.barrier()
    run.manager.close()
    return there


def test_failing_saves_are_counted_alike_on_all_ranks(tmp_path):
    assert run_distributed(fail_and_go_on, 2, str(tmp_path)) == [[0, 0, 1, 2]] * 2
    assert files.list_steps(tmp_path) == [3, 4]


def load_and_note_what_is_read(folder: str) -> tuple[int | None, list[str], dict[str, torch.Tensor]]:
    """Return the step, the files whose checksum this rank took, and the weights."""
    read: list[str] = []

    def note(path: Path, pool):
        read.append(f"{path.parent.name}/{path.name}")
        return sum_file(path, pool)

    sum_file, checksums.sum_file = checksums.sum_file, note
    run = Run(folder, SECTION, seed=3)
    return run.manager.load(), read, run.tensors()


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_file_is_verified_by_one_rank_and_all_fall_back_together(tmp_path, world_size):
    saved = run_distributed(train_and_save, 2, str(tmp_path), SECTION, False)[0]
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-4")
    damaged = tmp_path / "step-4" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    results = run_distributed(load_and_note_what_is_read, world_size, str(tmp_path))
    names = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    everything = sorted(f"{step}/{name}" for step in ("step-2", "step-4") for name in names)
    assert sorted(name for _, read, _ in results for name in read) == everything
    assert [f"{step}/__1_0.distcp" for step in ("step-4", "step-2")] == results[1][1]
    for step, _, loaded in results:
        assert step == 2
        assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []


def test_each_rank_copies_its_files_to_the_store_and_back(tmp_path):
    """A folder stands for the store. The local disk is lost, and another number of ranks goes on."""
    section = replace(SECTION, remote_folder=f"file://{tmp_path}/store", async_mode="async")
    saved = run_distributed(train_and_save, 2, str(tmp_path / "a"), section, False)[0]
    local = {path.name: path.read_bytes() for path in (tmp_path / "a" / "step-2").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "store" / "step-2").iterdir()} == local
    for step, position, loaded in run_distributed(load_tensors, 3, str(tmp_path / "b"), section, False):
        assert (step, position) == (2, 2)
        assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["step-2"]


def load_a_missing_step(folder: str) -> str:
    run = Run(folder, replace(SECTION, load_step=9))
    try:
        run.manager.load()
    except ValueError as error:
        return str(error)
    return "no error"


def test_missing_step_is_the_same_error_on_all_ranks(tmp_path):
    messages = run_distributed(load_a_missing_step, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "checkpoint.load_step = 9" in messages[0]
