"""run_status.py, poisoned.py and config/durations.py: small files and small texts."""

import json
from types import SimpleNamespace

import pytest

from trainer.components.poisoned import PoisonedBatches
from trainer.components.run_status import RunStatus
from trainer.config.durations import parse_duration


def test_status_is_written_whole_by_one_rank_and_cleared(tmp_path):
    RunStatus(tmp_path, is_writer=False).write("failed", step=3, reason="x")
    assert list(tmp_path.iterdir()) == []
    status = RunStatus(tmp_path, is_writer=True)
    status.write("preempted", step=3, reason="SIGTERM")
    status.write("complete", step=7, reason="done")
    content = json.loads((tmp_path / "status.json").read_text())
    assert (content["status"], content["step"], content["reason"]) == ("complete", 7, "done")
    status.clear()
    assert list(tmp_path.iterdir()) == []


def test_status_that_cannot_be_written_is_told(tmp_path, caplog):
    RunStatus(tmp_path / "missing", is_writer=True).write("failed", step=3, reason="the disk is full")
    assert "the disk is full" in caplog.text


def make_batches(folder, fingerprint="a"):
    shape = SimpleNamespace(global_batch_size=8)
    return PoisonedBatches(folder, SimpleNamespace(fingerprint=fingerprint, shape=shape))  # type: ignore[arg-type]


def test_poisoned_batches_are_remembered_for_one_order_of_data(tmp_path):
    batches = make_batches(tmp_path)
    assert [batches.add(24, "spike"), batches.add(40, "spike"), batches.add(24, "nonfinite")] == [1, 1, 2]
    again = make_batches(tmp_path)
    assert [again.find_kind(first) for first in (24, 32, 40)] == ["nonfinite", None, "spike"]
    assert [again.list_hopeless(first) for first in (0, 24, 25)] == [[24], [24], []]
    assert make_batches(tmp_path, fingerprint="b").find_kind(24) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": "a", "batch_size": 8, "batches": [{}]}'])
def test_damaged_file_of_poisoned_batches_is_begun_anew(tmp_path, text, caplog):
    (tmp_path / "poisoned.json").write_text(text)
    assert make_batches(tmp_path).find_kind(24) is None
    assert "is begun anew" in caplog.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3:50:00", 13800),
        ("1-12:00:00", 129600),
        ("2:30", 150),
        ("1-02:30", 95400),
        ("0:00:08", 8),
        (" 45:00\n", 2700),
        ("UNLIMITED", None),
        ("3h", None),
        ("90", None),
        ("", None),
    ],
)
def test_durations_are_read_as_slurm_writes_them(text, seconds):
    assert parse_duration(text) == seconds
