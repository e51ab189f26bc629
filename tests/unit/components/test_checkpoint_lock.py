"""The lock on a folder of checkpoints: two runs never write into one, and a dead one stands in nobody's way."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.components.checkpoint_run import SECTION, Run
from trainer.components import checkpoint_lock as lock
from trainer.components.checkpoint_lock import FolderLock, FolderTakenError

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from trainer.components import checkpoint_lock as lock
lock.HEARTBEAT_SECONDS = 0.05
lock.FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 20.0)  # a sign of life ends it
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.01)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint"


@pytest.fixture
def holder(folder: Path):
    """Another process that holds the lock on the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_second_run_is_refused_with_the_name_of_the_first(folder, holder):
    with pytest.raises(FolderTakenError, match=rf"is in use: process {holder.pid} on .*another job\.dump_folder"):
        FolderLock(folder).acquire()
    with pytest.raises(ValueError, match="is in use"):
        Run(folder)
    Run(folder, replace(SECTION, load_only=True))  # reads and disturbs nobody


def test_run_that_was_killed_on_this_machine_is_known_dead_at_once(folder, holder, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 1000.0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    taken = FolderLock(folder)
    taken.acquire()
    taken.check()
    assert f"process {holder.pid}" in caplog.text


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("change", [{"boot": "another machine"}, {"pid_space": "another container"}])
def test_lock_of_another_machine_that_nobody_touches_is_taken_over(folder, change):
    """As of a host that died: a requeued job elsewhere waits, and goes on."""
    left = FolderLock(folder)
    left.path.parent.mkdir(parents=True)
    left.path.write_text(left._describe())
    edit(left.path, **change)
    FolderLock(folder).acquire()


def test_lock_of_another_machine_that_is_touched_is_respected(folder, holder):
    edit(FolderLock(folder).path, boot="another machine", host="node17")
    with pytest.raises(FolderTakenError, match="on node17"):
        FolderLock(folder).acquire()


def test_process_number_that_was_given_anew_is_not_taken_for_the_owner(folder):
    left = FolderLock(folder)
    left.path.parent.mkdir(parents=True)
    left.path.write_text(left._describe())
    edit(left.path, born="1")
    assert lock._is_known_dead(json.loads(left.path.read_text()))


def test_owner_that_was_taken_for_dead_writes_no_more(folder):
    run = Run(folder)
    run.step(2)
    path = FolderLock(folder).path
    edit(path, token="other", host="node17", pid=7)
    with pytest.raises(ValueError, match=r"no longer this run's: process 7 on node17 has it"):
        run.step(2)
    assert [path.name for path in folder.iterdir()] == ["step-2"]
    run.manager.close()
    assert path.exists(), "it is the other's"


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_lock_that_says_nothing_is_taken_over(folder, content):
    path = FolderLock(folder).path
    path.parent.mkdir(parents=True)
    path.write_text(content)
    FolderLock(folder).acquire()


def test_lock_goes_when_the_run_ends_and_a_process_may_build_its_manager_anew(folder):
    path = FolderLock(folder).path
    first, second = Run(folder), Run(folder)
    first.manager.close()
    assert path.exists(), "it is the second's by now"
    second.manager.close()
    assert not path.exists()
    assert os.listdir(folder.parent) == []
