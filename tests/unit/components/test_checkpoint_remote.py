"""Checkpoints in a store: copied there once they are whole, gone on from where the local folder has none as new."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace

import fsspec
import pytest
import torch.distributed.checkpoint as dcp

from models.registry import get_model_spec
from tests.unit.components.checkpoint_run import MODES, SECTION, Run, assert_equal, weights
from trainer.components import checkpoint_files as files
from trainer.components import checkpoint_remote as remote
from trainer.components.checkpoint import CheckpointManager
from trainer.components.checkpoint_remote import RemoteCheckpoint, RemoteFolder
from trainer.components.hf_checkpoint import build_hugging_face
from trainer.components.tokenizer import build_tokenizer
from trainer.config.schema_training import ModelConfig

URL = "memory://bucket/run"
STORED = replace(SECTION, remote_folder=URL)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    """An empty store in memory, tried again without a pause."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.0)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def fail_for(monkeypatch: pytest.MonkeyPatch, store, method: str, times: int, only: str = "") -> list[str]:
    """Make a method of the store fail for so many calls (on paths that contain `only`); return the list of failed calls."""
    works: Callable = getattr(store, method)
    failed: list[str] = []

    def unreliable(*args, **kwargs):
        if len(failed) < times and only in str(args):
            failed.append(str(args))
            raise ConnectionError("the store is tired")
        return works(*args, **kwargs)

    monkeypatch.setattr(type(store), method, lambda self, *args, **kwargs: unreliable(*args, **kwargs))
    return failed


def names_in(store, step: int) -> set[str]:
    return {path.rsplit("/", 1)[1] for path in store.ls(f"/bucket/run/step-{step}", detail=False)}


@pytest.mark.parametrize("mode", MODES)
def test_run_goes_on_bitwise_from_the_store_when_the_local_disk_is_lost(tmp_path, store, mode):
    section = replace(STORED, async_mode=mode)
    expected = Run(tmp_path / "whole").step(6, save=False)
    first = Run(tmp_path / "run", section)
    losses = first.step(4)
    first.manager.close()
    assert RemoteFolder(URL).list_steps() == [2, 4]
    local = {path.name: path.read_bytes() for path in (tmp_path / "run" / "step-4").iterdir()}
    assert {name: store.cat_file(f"/bucket/run/step-4/{name}") for name in names_in(store, 4)} == local
    shutil.rmtree(tmp_path / "run")
    resumed = Run(tmp_path / "run", section, seed=9)
    assert resumed.manager.load() == 4
    assert losses + resumed.step(2) == expected
    resumed.manager.close()
    assert files.list_steps(tmp_path / "run") == [4, 6], "what was copied is a checkpoint here too"
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_local_checkpoint_comes_before_its_copy_and_the_newer_before_both(tmp_path, store):
    run = Run(tmp_path, STORED)
    run.step(4)
    run.manager.close()
    store.get_file = None  # nothing is copied while the local ones will do
    assert Run(tmp_path, STORED, seed=1).manager.load() == 4
    del store.get_file
    shutil.rmtree(tmp_path / "step-4")
    resumed = Run(tmp_path, STORED, seed=1)
    assert resumed.manager.load() == 4
    assert_equal(weights(resumed), weights(run))
    with pytest.raises(ValueError, match=r"load_step = 3: .* or memory://bucket/run; there are 2, 4"):
        resumed.manager.load(3)
    shutil.rmtree(tmp_path / "step-2")
    assert Run(tmp_path, replace(STORED, load_step=2)).manager.load() == 2


def test_who_only_loads_leaves_no_copy(tmp_path, store):
    run = Run(tmp_path / "a", STORED)
    run.step(2)
    run.manager.close()
    watching = Run(tmp_path / "b", replace(STORED, load_only=True), seed=4)
    assert watching.manager.load() == 2
    assert_equal(weights(watching), weights(run))
    assert list((tmp_path / "b").iterdir()) == []


def test_damaged_local_checkpoint_is_replaced_by_its_copy(tmp_path, store, caplog):
    run = Run(tmp_path, STORED)
    run.step(4)
    run.manager.close()
    (tmp_path / "step-4" / "__0_0.distcp").write_bytes(b"?")
    resumed = Run(tmp_path, STORED, seed=1)
    assert resumed.manager.load() == 4
    assert "CHECKPOINT DAMAGED" in caplog.text
    assert_equal(weights(resumed), weights(run))
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["2", "4", "4.damaged"]


def test_damaged_copy_is_refused_and_the_one_before_taken(tmp_path, store, caplog):
    run = Run(tmp_path, STORED)
    run.step(4)
    run.manager.close()
    shutil.rmtree(tmp_path)
    store.pipe_file("/bucket/run/step-4/__0_0.distcp", b"?")
    assert Run(tmp_path, STORED).manager.load() == 2
    assert "CHECKPOINT DAMAGED: memory://bucket/run/step-4: __0_0.distcp has 1 of" in caplog.text
    store.rm_file("/bucket/run/step-2/.metadata")
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* or memory://bucket/run can be resumed from"):
        Run(tmp_path, STORED).manager.load()


def test_copy_that_was_cut_off_is_no_checkpoint(tmp_path, store, monkeypatch, caplog):
    """The manifest comes last; a copy of that step that was there before is taken away first."""
    run = Run(tmp_path, replace(STORED, max_failed_saves=9))
    run.step(2)
    run.manager.wait()
    run.step(1)
    fail_for(monkeypatch, store, "put_file", times=99, only=".distcp")
    run.manager.save(2)
    run.manager.wait()
    assert "CHECKPOINT NOT COPIED" in caplog.text
    assert f"{tmp_path / 'step-2'} is whole" in caplog.text
    assert RemoteFolder(URL).list_steps() == []
    (failure,) = [report for report in run.manager.take_reports() if report.error]
    assert "the store is tired" in failure.error
    assert Run(tmp_path, STORED).manager.load() == 2, "the local one is there"


@pytest.mark.parametrize("method", ["put_file", "pipe_file", "exists"])
def test_what_fails_is_tried_again(tmp_path, store, monkeypatch, caplog, method):
    failed = fail_for(monkeypatch, store, method, times=remote.ATTEMPTS - 1)
    run = Run(tmp_path, STORED)
    run.step(2)
    run.manager.close()
    assert len(failed) == remote.ATTEMPTS - 1
    assert f"attempt {remote.ATTEMPTS} of {remote.ATTEMPTS}" in caplog.text
    assert RemoteFolder(URL).list_steps() == [2]
    failed = fail_for(monkeypatch, store, "get_file", times=remote.ATTEMPTS - 1)
    shutil.rmtree(tmp_path)
    assert Run(tmp_path, STORED).manager.load() == 2
    assert failed


def test_copies_that_fail_stop_the_run_when_there_are_too_many(tmp_path, store, monkeypatch):
    fail_for(monkeypatch, store, "put_file", times=10**6)
    run = Run(tmp_path, replace(STORED, max_failed_saves=1, interval=1))
    run.step(1)
    with pytest.raises(RuntimeError, match=r"the store is tired.*2 saves in a row"):
        run.step(3)


def test_store_keeps_as_many_as_the_disk_and_lets_foreign_names_be(tmp_path, store):
    store.pipe_file("/bucket/run/step-100.bak/x", b"")
    store.pipe_file("/bucket/run/step-90/__0_0.distcp", b"no manifest")
    run = Run(tmp_path, replace(STORED, interval=1, keep_latest_k=2))
    run.step(4)
    run.manager.close()
    assert RemoteFolder(URL).list_steps() == files.list_steps(tmp_path) == [3, 4]
    assert store.exists("/bucket/run/step-100.bak/x")
    assert store.exists("/bucket/run/step-90/__0_0.distcp")


def test_store_keeps_what_was_saved_last_when_a_run_goes_back(tmp_path, store):
    for step, created in ((3, "2026-01-01"), (4, "2026-01-02"), (1, "2026-01-03")):
        (tmp_path / "checkpoint.json").unlink(missing_ok=True)
        files.write_manifest(tmp_path, {"format": 2, "created": created})
        RemoteFolder(URL).at(step).finish(tmp_path)
    assert RemoteFolder(URL).list_steps_by_age() == [3, 4, 1]


@pytest.mark.parametrize("model_only", [True, False])
def test_run_begins_from_a_checkpoint_in_a_store(tmp_path, store, model_only):
    run = Run(tmp_path / "a", STORED)
    run.step(2)
    run.manager.close()
    section = replace(SECTION, initial_load_path=f"{URL}/step-2", initial_load_model_only=model_only)
    begun = Run(tmp_path / "b", section, seed=4)
    assert begun.manager.load() == (0 if model_only else 2)
    assert_equal(weights(begun), weights(run))
    assert list((tmp_path / "b").iterdir()) == []
    for url, hint in ((URL, "it holds the checkpoints step-2: name one"), ("memory://nowhere", r"no \.metadata")):
        with pytest.raises(ValueError, match=hint):
            Run(tmp_path / "c", replace(section, initial_load_path=url)).manager.load()


def test_run_begins_from_another_programs_weights_in_a_store(tmp_path, store):
    run = Run(tmp_path / "a")
    dcp.save(run.model.state_dict(), checkpoint_id=tmp_path / "theirs")
    store.put(str(tmp_path / "theirs") + "/", "/bucket/theirs/", recursive=True)
    begun = Run(tmp_path / "b", replace(SECTION, initial_load_path="memory://bucket/theirs"), seed=8)
    assert begun.manager.load() == 0
    assert_equal(weights(begun), weights(run))


def test_seed_is_in_the_store_when_it_is_saved(tmp_path, store, monkeypatch):
    Run(tmp_path, STORED).manager.save_seed()
    assert RemoteFolder(URL).list_steps() == [0]
    fail_for(monkeypatch, store, "put_file", times=99)
    with pytest.raises(RuntimeError, match="the store is tired"):
        Run(tmp_path, STORED).manager.save_seed()


def test_file_outside_of_the_folder_is_not_copied(tmp_path, store):
    store.pipe_file("/bucket/secret", b"")
    with pytest.raises(ValueError, match="not directly in its folder"):
        RemoteCheckpoint(f"{URL}/step-2").download(["../../secret"], tmp_path)


@pytest.mark.parametrize(("url", "error"), [("what://x/y", ValueError), ("gs://bucket/x", ImportError)])
def test_store_that_nothing_here_can_reach_is_an_error_at_once(url, error):
    if error is ImportError and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(error):
        RemoteFolder(url)


def test_hugging_face_folder_at_the_end_of_a_run_is_copied_with_its_description_last(
    tmp_path, store, monkeypatch, caplog
):
    args = replace(get_model_spec("llama3").get_args("debugmodel"), n_layers=1)
    model = get_model_spec("llama3").load_model_class()(args)
    section = replace(STORED, last_save_in_hf=True, last_save_model_only=True)
    hugging_face = build_hugging_face(
        section, model=ModelConfig(name="llama3"), args=args, folder=tmp_path, tokenizer=build_tokenizer("byte")
    )
    manager = CheckpointManager({"model": model}, section=section, folder=tmp_path, hugging_face=hugging_face)
    store.pipe_file("/bucket/run/step-3/__0_0.distcp", b"of another run, cut off")
    manager.save(3, last=True)
    local = {path.name: path.read_bytes() for path in (tmp_path / "step-3").iterdir()}
    assert "model.safetensors" in local
    assert {name: store.cat_file(f"/bucket/run/step-3/{name}") for name in names_in(store, 3)} == local
    assert RemoteFolder(URL).list_steps() == [], "it is no checkpoint to resume from"
    fail_for(monkeypatch, store, "put_file", times=99, only="model.safetensors")
    with pytest.raises(RuntimeError, match=r"the store is tired.* It was the last one of the run"):
        manager.save(4, last=True)
    assert f"{tmp_path / 'step-4'} is whole" in caplog.text
    assert "config.json" not in names_in(store, 4)
    manager.close()
