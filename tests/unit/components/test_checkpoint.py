"""The checkpoint manager in one process: folders, choice, what fits, and exact continuation."""

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from tests.unit.components.checkpoint_run import MODES, SECTION, Run, assert_equal, weights
from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_state import ModelState


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_goes_on_bitwise_twice(tmp_path, mode):
    section = replace(SECTION, async_mode=mode)
    expected = Run(tmp_path / "whole", section).step(8, save=False)
    first = Run(tmp_path / "cut", section)
    losses = first.step(2)
    first.step(1)  # goes on while the save may still be written, and is lost
    first.manager.close()
    for start in (2, 4):
        resumed = Run(tmp_path / "cut", section, seed=99)
        assert resumed.manager.load() == start
        assert resumed.counters.values["step"] == start
        losses += resumed.step(2)
        resumed.manager.close()
    assert losses == expected[:6]


@pytest.mark.parametrize(
    ("section", "step", "last", "due"),
    [
        (SECTION, 2, False, True),
        (SECTION, 3, False, False),
        (SECTION, 3, True, True),
        (SECTION, 1, False, False),
        (SECTION, 0, False, False),
        (replace(SECTION, enable_first_step_checkpoint=True), 1, False, True),
        (replace(SECTION, load_only=True), 2, True, False),
        (replace(SECTION, enable=False), 2, True, False),
    ],
)
def test_should_save(tmp_path, section, step, last, due):
    run = Run(tmp_path, section)
    assert run.manager.should_save(step, last) is due
    assert run.manager.save(step, last) is due
    assert files.list_steps(tmp_path) == ([step] if due else [])


def test_keep_latest_k_counts_whole_checkpoints_and_leaves_foreign_names_alone(tmp_path):
    for name in ("step-100.bak", "xstep-3", "step-007", "step-90", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-90" / files.MANIFEST_NAME).write_text("{}")  # no tensors: not whole
    run = Run(tmp_path, replace(SECTION, interval=1, keep_latest_k=2))
    run.step(5)
    run.manager.close()
    assert files.list_steps(tmp_path) == [4, 5]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-100.bak", "xstep-3", "step-007", "step-90", "notes", "step-4", "step-5"}


def test_a_foreign_folder_of_that_step_is_moved_aside_and_kept(tmp_path, caplog):
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / files.TENSOR_INDEX_NAME).write_text("another program's")
    run = Run(tmp_path, SECTION)
    assert "step-2 is not a whole checkpoint of this program" in caplog.text
    run.step(2)
    run.manager.close()
    assert files.list_steps(tmp_path) == [2]
    (kept,) = tmp_path.glob("step-2.not-ours-*")
    assert (kept / files.TENSOR_INDEX_NAME).read_text() == "another program's"


def test_going_back_keeps_what_was_written_last(tmp_path):
    run = Run(tmp_path, replace(SECTION, interval=1, keep_latest_k=2))
    run.step(4)
    run.manager.close()
    again = Run(tmp_path, replace(SECTION, interval=1, keep_latest_k=2, load_step=3))
    assert again.manager.load() == 3
    for step in (1, 2):  # a run that went far back: its steps are lower, and newer
        again.manager.save(step)
    again.manager.close()
    assert files.list_steps(tmp_path) == [1, 2]


def test_save_over_an_existing_step_replaces_it(tmp_path, caplog):
    run = Run(tmp_path)
    run.step(2)
    run.step(1)
    with caplog.at_level(logging.WARNING):
        run.manager.save(2)
    assert "is replaced" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    resumed = Run(tmp_path, seed=5)
    assert resumed.manager.load() == 2
    assert_equal(weights(resumed), weights(run))


@pytest.mark.parametrize("fails_at", ["rename aside", "rename new", "delete aside"])
def test_interrupted_replacement_leaves_one_whole(tmp_path, monkeypatch, fails_at):
    run = Run(tmp_path)
    run.step(2)
    old = weights(run)
    run.step(1)
    calls = []

    def failing_rename(self, target):
        if self.is_dir():  # DCP renames a file of its own
            calls.append(target)
            if len(calls) == {"rename aside": 1, "rename new": 2}.get(fails_at):
                raise KeyboardInterrupt
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    if fails_at == "delete aside":
        monkeypatch.setattr(files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.manager.save(2)
    monkeypatch.undo()
    resumed = Run(tmp_path, seed=5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert resumed.manager.load() == 2
    assert_equal(weights(resumed), weights(run) if fails_at == "delete aside" else old)


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut a file that was not has the right name and no content."""
    synced, renamed = [], []

    def note_sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    rename = Path.rename
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(
        Path, "rename", lambda self, target: renamed.append((Path(target).name, len(synced))) or rename(self, target)
    )
    Run(tmp_path).step(2)
    staged = {"__0_0.distcp", ".metadata.tmp", files.MANIFEST_NAME, ".step-2.staging"}
    assert renamed[-1] == ("step-2", 4)
    assert set(synced[:4]) == staged
    assert synced[4:] == [tmp_path.name]


def test_leftovers_of_a_crash_are_removed_at_start_unless_only_loading(tmp_path):
    run = Run(tmp_path)
    run.step(2)
    for name in (
        ".step-4.staging",
        ".step-1.deleted",
        ".step-3.01234567.fetched",
        ".initial.89abcdef.fetched",
        ".other",
    ):
        (tmp_path / name).mkdir()
    Run(tmp_path, replace(SECTION, load_only=True))
    assert (tmp_path / ".step-4.staging").exists()
    Run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "step-2"]


@pytest.mark.parametrize("mode", MODES[1:])
def test_background_save_holds_the_values_of_its_step(tmp_path, monkeypatch, mode):
    """Copying and writing are slowed down, so that training overtakes them if it is not made to wait."""
    stage, write = StateDictStager.stage, dcp.FileSystemWriter.write_data

    def slow(function):
        def call(*args, **kwargs):
            time.sleep(0.2)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(StateDictStager, "stage", slow(stage))
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slow(write))
    run = Run(tmp_path, replace(SECTION, async_mode=mode))
    run.step(2, save=False)
    expected = weights(run)
    run.manager.save(2)
    assert files.list_steps(tmp_path) == []
    run.step(1, save=False)  # its forward pass changes buffers, its optimizer step the weights
    run.manager.wait()
    report = run.manager.last_save
    assert 0.2 <= report.stall_seconds < report.seconds - 0.1
    resumed = Run(tmp_path, seed=3)
    assert resumed.manager.load() == 2
    assert_equal(weights(resumed), expected)


def test_memory_for_copies_is_there_before_the_first_save(tmp_path, monkeypatch):
    """Pinning it takes seconds, for which the optimizer step after the first save would wait."""
    copies = []
    stage = StateDictStager.stage

    def record(self, *args, **kwargs):
        copies.append(stage(self, *args, **kwargs))
        return copies[-1]

    monkeypatch.setattr(StateDictStager, "stage", record)
    run = Run(tmp_path, replace(SECTION, async_mode="async_with_pinned_mem"))
    before = weights(run)
    assert run.manager.load() is None
    assert len(copies) == 1
    assert_equal(weights(run), before)
    run.step(2)
    run.manager.close()
    assert len({copy["model"]["0.weight"].data_ptr() for copy in copies}) == 1


def test_load_with_nothing_there_returns_none(tmp_path):
    assert Run(tmp_path / "never made").manager.load() is None
    (tmp_path / "empty").mkdir()
    assert Run(tmp_path / "empty").manager.load() is None


def test_load_step_that_is_missing_names_those_that_exist(tmp_path, caplog):
    Run(tmp_path).step(4)
    run = Run(tmp_path, replace(SECTION, load_step=3))
    with pytest.raises(ValueError, match=r"checkpoint\.load_step = 3: .*there are 2, 4"):
        run.manager.load()
    assert run.manager.load(2) == 2
    assert "also holds later checkpoints (4)" in caplog.text
    with pytest.raises(ValueError, match="there is none at all"):
        Run(tmp_path / "nowhere").manager.load(7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_only_last_save_can_be_begun_from(tmp_path, dtype):
    section = replace(SECTION, last_save_model_only=True, export_dtype=dtype)
    run = Run(tmp_path / "a", section)
    run.step(3)
    run.manager.save(3, last=True)
    source = tmp_path / "a" / "step-3"
    (tmp_path / "b").mkdir()  # existing but empty: the initial load must not be skipped
    begun = Run(tmp_path / "b", replace(SECTION, initial_load_path=str(source)), seed=9)
    assert begun.manager.load() == 0
    rounded = {
        k: v.to(getattr(torch, dtype)).to(v.dtype) if v.is_floating_point() else v for k, v in weights(run).items()
    }
    assert_equal(weights(begun), rounded)
    assert begun.counters.values["step"] == 0
    stored = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    assert stored["model.0.weight"].properties.dtype == getattr(torch, dtype)


def test_float32_export_of_a_bf16_run_is_float32(tmp_path):
    run = Run(tmp_path, replace(SECTION, last_save_model_only=True))
    run.model.bfloat16()
    run.manager.save(3, last=True)
    stored = dcp.FileSystemReader(tmp_path / "step-3").read_metadata().state_dict_metadata
    assert stored["model.0.weight"].properties.dtype == torch.float32


def test_model_only_checkpoint_is_passed_over_when_resuming(tmp_path, caplog):
    run = Run(tmp_path, replace(SECTION, last_save_model_only=True))
    run.step(2)
    run.manager.save(3, last=True)
    resumed = Run(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resumed.manager.load() == 2
    assert "Passing over" in caplog.text
    with pytest.raises(ValueError, match=r"step-3 holds model, but not optimizer.*last_save_model_only"):
        resumed.manager.load(3)


def test_folder_with_nothing_to_resume_from_is_an_error_not_a_fresh_start(tmp_path):
    run = Run(tmp_path, replace(SECTION, last_save_model_only=True))
    run.manager.save(3, last=True)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be resumed from"):
        Run(tmp_path).manager.load()


def test_initial_load_of_everything_goes_on_from_its_step(tmp_path):
    run = Run(tmp_path / "a")
    run.step(2)
    expected = run.step(3, save=False)
    section = replace(SECTION, initial_load_path=str(tmp_path / "a" / "step-2"), initial_load_model_only=False)
    other = Run(tmp_path / "b", section, seed=3)
    assert other.manager.load() == 2
    assert other.step(3) == expected


def test_own_checkpoints_come_before_the_initial_path(tmp_path):
    Run(tmp_path / "a").step(2)
    mine = Run(tmp_path / "b", replace(SECTION, initial_load_path=str(tmp_path / "a" / "step-2")), seed=3)
    mine.step(2)
    expected = weights(mine)
    again = Run(tmp_path / "b", replace(SECTION, initial_load_path=str(tmp_path / "a" / "step-2")))
    assert again.manager.load() == 2
    assert_equal(weights(again), expected)


@pytest.mark.parametrize(
    ("path", "hint"), [("a", "it holds the checkpoints step-2: name one"), ("none", r"no \.metadata")]
)
def test_initial_path_without_a_checkpoint_is_refused(tmp_path, path, hint):
    Run(tmp_path / "a").step(2)
    with pytest.raises(ValueError, match=rf"checkpoint\.initial_load_path = .*{hint}"):
        Run(tmp_path / "b", replace(SECTION, initial_load_path=str(tmp_path / path))).manager.load()


def test_weights_saved_by_torchtitan_can_be_begun_from(tmp_path):
    """Its checkpoints hold the weights without a prefix, beside the other states, and no manifest."""
    run = Run(tmp_path / "a")
    dcp.save({**run.model.state_dict(), "train_state": {"step": 3}}, checkpoint_id=tmp_path / "theirs")
    section = replace(SECTION, initial_load_path=str(tmp_path / "theirs"))
    begun = Run(tmp_path / "b", section, seed=8)
    assert begun.manager.load() == 0
    assert_equal(weights(begun), weights(run))
    with pytest.raises(ValueError, match="another program wrote it"):
        Run(tmp_path / "c", replace(section, initial_load_model_only=False)).manager.load()


def test_seed_checkpoint_gives_its_weights_to_another_run(tmp_path):
    seed = Run(tmp_path)
    seed.manager.save_seed()
    other = Run(tmp_path, seed=4)
    assert other.manager.load() == 0
    assert_equal(weights(other), weights(seed))
    assert other.optimizer.state_dict()["state.0.weight.step"] == 0


def test_exclude_from_loading_leaves_a_state_as_it_is(tmp_path):
    Run(tmp_path).step(2)
    run = Run(tmp_path, replace(SECTION, exclude_from_loading=["optimizer", "rng"]))
    assert run.manager.load() == 2
    assert run.optimizer.state_dict()["state.0.weight.step"] == 0
    assert run.lr_scheduler.state_dict() == {"steps_taken": 2}
    with pytest.raises(ValueError, match=r"no state 'optimiser'\. Did you mean optimizer\?"):
        Run(tmp_path, replace(SECTION, exclude_from_loading=["optimiser"]))


def test_another_model_or_optimizer_is_refused_with_names(tmp_path):
    Run(tmp_path).step(2)
    with pytest.raises(ValueError, match=r"shapes differ: .*model\.0\.weight \(\(4, 4\) there, \(6, 6\) here\)"):
        Run(tmp_path, width=6).manager.load()
    with pytest.raises(ValueError, match=r"it lacks optimizer\.state\.0\.weight\.momentum_buffer"):
        Run(tmp_path, name="Muon").manager.load()
    deeper, shallower = Run(tmp_path), Run(tmp_path)
    for run, layers in ((deeper, [*deeper.model, nn.Linear(4, 4)]), (shallower, list(shallower.model)[:2])):
        run.manager._states["model"] = ModelState(nn.Sequential(*layers))
        run.manager._reader._states["model"] = run.manager._states["model"]
    with pytest.raises(ValueError, match=r"it lacks model\.3\.bias, model\.3\.weight"):
        deeper.manager.load()
    with pytest.raises(ValueError, match=r"it holds model\.2\.bias, model\.2\.weight that the model has not"):
        shallower.manager.load()


def test_last_save_is_reported(tmp_path):
    run = Run(tmp_path)
    run.step(2)
    report = run.manager.last_save
    assert (report.step, report.stall_seconds) == (2, report.seconds)
    assert report.size == sum(path.stat().st_size for path in (tmp_path / "step-2").iterdir()) > 0


def test_plain_values_stand_in_the_manifest(tmp_path):
    Run(tmp_path).step(2)
    manifest = json.loads((tmp_path / "step-2" / files.MANIFEST_NAME).read_text())
    assert (manifest["step"], manifest["world_size"]) == (2, 1)
    assert manifest["plain"]["lr_scheduler"] == {"shared": {"steps_taken": 2}}
    assert manifest["tensors"] == ["model", "optimizer", "rng"]


def test_state_that_json_cannot_hold_survives(tmp_path):
    run = Run(tmp_path)
    run.counters.values["pair"] = (1, 2)
    run.step(2)
    resumed = Run(tmp_path)
    resumed.counters.values["pair"] = (0, 0)
    resumed.manager.load()
    assert resumed.counters.values["pair"] == (1, 2)
