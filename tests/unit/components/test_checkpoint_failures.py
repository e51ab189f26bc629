"""Saves that fail: an alarm, nothing left behind, and training goes on until too many in a row have failed."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch.distributed.checkpoint as dcp

from tests.unit.components.checkpoint_run import MODES, SECTION, Run
from trainer.components import checkpoint_files as files


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Returns what makes the disk full for the time of a `with` block."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    @contextmanager
    def fill() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(dcp.FileSystemWriter, "write_data", fail)
            yield

    return fill


@pytest.mark.parametrize("mode", MODES)
def test_failing_save_raises_an_alarm_leaves_nothing_and_training_goes_on(tmp_path, full_disk, caplog, mode):
    run = Run(tmp_path, replace(SECTION, async_mode=mode, max_failed_saves=2))
    run.step(2)
    run.manager.wait()
    with full_disk():
        run.step(4)  # two saves fail
        run.manager.wait()
    loud = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert sum("CHECKPOINT NOT SAVED: could not write step-" in line for line in loud) == 2
    assert any(
        re.search(r"its disk has [\d.]+ GiB free, the last checkpoint took [\d.]+ GiB\)$", line) for line in loud
    )
    assert "Training goes on without a checkpoint: 2 saves in a row" in loud[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    reports = run.manager.take_reports()
    assert [(report.step, "No space left" in report.error, report.size > 0) for report in reports] == [
        (2, False, True), (4, True, False), (6, True, False),
    ]  # fmt: skip
    assert all(0 < report.stall_seconds <= report.seconds for report in reports)
    assert run.manager.take_reports() == []
    run.step(2)
    run.manager.wait()
    with full_disk():
        run.step(4)  # the count began anew
        run.manager.wait()
    run.step(2)
    run.manager.close()
    assert files.list_steps(tmp_path) == [2, 8, 14]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("allowed", [0, 1])
def test_too_many_failing_saves_in_a_row_stop_the_run(tmp_path, full_disk, mode, allowed):
    run = Run(tmp_path, replace(SECTION, async_mode=mode, max_failed_saves=allowed))
    words = rf"No space left on device.* {allowed + 1} saves in a row.*max_failed_saves = {allowed}"
    with full_disk():
        run.step(2 * allowed + 1)
        with pytest.raises(RuntimeError, match=words):  # noqa: PT012 in the background it comes out later
            run.step(1)
            run.manager.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
def test_run_can_still_roll_back_after_a_save_that_failed(tmp_path, full_disk, mode):
    run = Run(tmp_path, replace(SECTION, async_mode=mode))
    run.step(2)
    run.manager.wait()
    with full_disk():
        run.step(3)
        assert run.manager.load_newest()
    assert run.counters.values["step"] == 2


def test_last_save_that_fails_is_an_error(tmp_path, full_disk):
    run = Run(tmp_path)
    with full_disk(), pytest.raises(RuntimeError, match=r"No space left on device\. It was the last one of the run"):
        run.manager.save(3, last=True)


def test_background_failure_that_no_later_save_makes_good_is_an_error_at_close(tmp_path, full_disk):
    run = Run(tmp_path, replace(SECTION, async_mode="async"))
    with full_disk():
        run.step(2)
        with pytest.raises(RuntimeError, match="No space left"):
            run.manager.close()


def test_file_that_is_shorter_than_what_was_written_fails_the_save(tmp_path, monkeypatch, caplog):
    real_save = dcp.save

    def save_and_truncate(*args, **kwargs):
        metadata = real_save(*args, **kwargs)
        for file in tmp_path.glob(".step-2.staging/*.distcp"):
            file.write_bytes(file.read_bytes()[:-1])
        return metadata

    monkeypatch.setattr(dcp, "save", save_and_truncate)
    Run(tmp_path).step(2)
    assert "CHECKPOINT NOT SAVED: could not finish step-2" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
def test_files_that_other_hosts_keep_to_themselves_fail_the_save(tmp_path, monkeypatch, caplog, mode):
    run = Run(tmp_path, replace(SECTION, async_mode=mode))
    real_save = dcp.save

    def save_elsewhere(*args, **kwargs):
        metadata = real_save(*args, **kwargs)
        for file in tmp_path.glob(".step-2.staging/*.distcp"):
            file.unlink()
        return metadata

    monkeypatch.setattr(dcp, "save", save_elsewhere)

    def save() -> None:
        run.step(2)
        run.manager.wait()

    with pytest.raises(ValueError, match="on a file system that they share"):
        save()
    assert files.list_steps(tmp_path) == []
