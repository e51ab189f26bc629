import json
import time

import pytest

from scripts import report
from scripts.run_report import facts
from scripts.run_report.panels import build_panels, thin
from tests.unit.scripts.report_runs import make_event, make_record, write_run
from trainer.components.checkpoint_files import MANIFEST_NAME, TENSOR_INDEX_NAME
from trainer.components.run_history import RunReadError, load_run

STEPS = range(1, 101)
SLOW_AND_UNEVEN = {
    "memory_retries": 1,
    "ranks/matmul_slowdown": 1.3,
    "ranks/matmul_rank": 5,
    "experts/max_over_mean": 3.0,
    "experts/layers.1/max_over_mean": 3.0,
}


@pytest.fixture
def eventful(tmp_path):
    """A run in which everything happened that a report tells of."""
    lines = [make_record(step, data_wait=0.1, **{"float8/saturated_max": 0.002}) for step in range(1, 61)]
    lines[39:40] = [make_record(40, loss=None, nonfinite={"loss": "nan"}), make_event("skip", 40, skipped=1)]
    lines += [
        make_event("fallback", 0, message="plan B"),
        make_event("warning", 5, message="a worry"),
        make_event("warning", 9, message="a worry"),
        make_event("checkpoint", 50, saved_step=50, seconds=9.0, stall_seconds=5.0, gib=1.5),
        make_event("checkpoint_failed", 60, saved_step=60, seconds=1.0, stall_seconds=1.0, error="disk <full>"),
        make_event("rollback", 50, failed_step=60),
        make_event("resume", 50, tokens_seen=50_000),
        make_event("validation", 50, loss=2.5, seconds=1.0),
        make_event("end", 50, steps=50, seconds=60.0),
        make_event("resume", 50, tokens_seen=50_000),
        *(make_record(step, **SLOW_AND_UNEVEN) for step in range(51, 101)),
    ]
    return write_run(tmp_path / "eventful", lines, status="failed")


def test_remarks_tell_what_went_wrong_and_what_cost_speed(eventful):
    remarks = facts.find_remarks(load_run(eventful), time.time())
    text = "\n".join(f"{remark.level}: {remark.text}" for remark in remarks)
    for told in (
        "bad: The run failed: for a test (step 100).",
        "bad: 1 checkpoint could not be saved; the last time: disk <full>",
        "Stopped and resumed once: it went on from step 50",
        "bad: Rolled back once: bad loss or gradient at step 60.",
        "bad: 1 step left out, because loss or gradient was not finite or a spike: step 40.",
        "1 thing done otherwise than the settings ask for first",
        "1 thing warned of",
        "The loop waited for data",
        "Training stood still for checkpoints 6.0% of the time",
        "bad: Memory was nearly full",
        "A GPU computed up to 30% slower than the others, which wait for it: rank 5 at step 51, in 50 logged steps.",
        "the busiest has 3.0 times the mean load",
        "Float8 cut off up to 0.20%",
    ):
        assert told in text
    assert len(remarks) == 13


def test_nothing_stands_out_of_a_run_in_which_nothing_happened(tmp_path):
    folder = write_run(tmp_path / "run", [make_record(step) for step in STEPS], status="complete")
    assert facts.find_remarks(load_run(folder), time.time()) == []


def test_facts_are_those_of_the_records(eventful):
    found = facts.get_facts(load_run(eventful, "other name"), time.time())
    assert found["on"] == "8 x NVIDIA H200"
    assert found["loss, first step"] == "7.7074"
    assert found["validation loss, last"] == "2.5000"
    assert found["MFU, median"] == "45.0%"
    assert found["memory at most"] == "100.00 GiB"
    assert found["state"].startswith("failed: for a test")


def test_events_with_the_same_words_are_one_row(eventful):
    rows = {(row.kind, row.text): row.steps for row in facts.describe_events(load_run(eventful))}
    assert rows["warning", "a worry (2 times)"] == "5 to 9"
    assert rows["rollback", "back to step 50 for what was found at step 60"] == "50"
    assert rows["failed", "for a test"] == "100"
    assert not any(kind == "validation" for kind, _ in rows)


def test_saves_say_whether_they_are_still_there(eventful):
    (eventful / "checkpoint" / "step-50").mkdir(parents=True)
    for name in (MANIFEST_NAME, TENSOR_INDEX_NAME):
        (eventful / "checkpoint" / "step-50" / name).touch()
    rows = facts.describe_saves(load_run(eventful))
    assert rows == [["50", "1.50", "9.0", "5.00", "kept"], ["60", "-", "1.0", "1.00", "FAILED: disk <full>"]]


def test_state_of_a_run_without_a_last_word_depends_on_how_long_ago_it_spoke(tmp_path):
    run = load_run(write_run(tmp_path / "run", [make_record(step) for step in STEPS], tail='{"step": 101, "lo'))
    assert run.last_step() == 100
    assert run.describe_state(time.time()) == "going on"
    assert facts.describe_end(run, run.last_word() + 3600) == (
        "no word",
        "step 100 of 10,000 was its last word, 1h00m before this page was made: killed, on a host that is gone, or hanging.",
    )


def test_run_whose_process_closed_its_files_has_ended(tmp_path):
    run = load_run(write_run(tmp_path / "run", [make_record(7), make_event("end", 7, steps=7)]))
    assert facts.describe_end(run, time.time() + 3600) == ("ended", "step 7 of 10,000 was its last.")


def test_settings_that_differ_are_found_against_defaults_and_between_runs(tmp_path):
    lines = [make_record(1)]
    first = load_run(write_run(tmp_path / "a", lines, settings=["--optimizer.lr", "1e-4"]))
    other = load_run(write_run(tmp_path / "b", lines, settings=["--optimizer.lr", "2e-4", "--job.dump_folder", "b"]))
    assert facts.describe_changes(first) == {
        "job.description": ("a test", "default job"),
        "optimizer.lr": ("0.0001", "0.0008"),
    }
    assert facts.describe_differences([first, other]) == {"optimizer.lr": ["0.0001", "0.0002"]}


def test_many_points_are_drawn_as_mean_and_range_so_that_no_spike_is_lost():
    values = dict.fromkeys(range(10000), 1.0) | {5_000: 99.0}
    points = thin(values, 100)
    assert len(points.steps) == 100
    assert max(points.high) == 99.0
    assert max(points.values) == pytest.approx(1 + 98 / 100)
    assert points.is_mean


def test_panels_are_those_that_have_values(eventful, tmp_path):
    keys = [panel.key for panel in build_panels([load_run(eventful)])]
    assert keys == ["loss", "grad_norm", "lr", "speed", "mfu", "memory", "data_wait", "slowdown", "experts", "saturated", "max_over_mean_layers_0"]  # fmt: skip
    spiky = [make_record(step, grad_norm=500.0 if step == 50 else 1.0) for step in STEPS]
    runs = [load_run(eventful), load_run(write_run(tmp_path / "spiky", spiky))]
    panels = {panel.key: panel for panel in build_panels(runs)}
    assert panels["grad_norm"].is_log()
    assert not panels["loss"].is_log()
    assert panels["difference"].lines[0].values[100] == 0.0


def test_layers_show_the_worst_of_their_tensors_in_float8(tmp_path):
    shares = {"attention.wq/input": 0.01, "moe.experts.w1/input": 0.03, "moe.experts.w2/grad_output": 0.02}
    record = {f"float8/layers.1.{name}/underflowed": share for name, share in shares.items()}
    run = load_run(write_run(tmp_path / "float8", [make_record(step, **record) for step in STEPS]))
    (panel,) = (panel for panel in build_panels([run]) if panel.layers)
    assert (panel.key, panel.layers["1"][1]) == ("underflowed_layers_0", 3.0)


def test_page_and_png_are_written_and_escape_what_runs_say(tmp_path, capsys):
    lines = [*map(make_record, range(1, 6)), make_event("warning", 5, message="disk <full>")]
    folder = write_run(tmp_path / "run", lines)
    page, png = tmp_path / "out" / "page.html", tmp_path / "out" / "page.png"
    assert report.main([str(folder), "--out", str(page), "--png", str(png)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "disk &lt;full&gt;" in text
    assert "disk <full>" not in text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "page.png"]
    assert f"wrote {page}" in capsys.readouterr().out


def test_watch_writes_again_until_the_run_has_ended(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [make_record(step) for step in range(1, 4)])
    pages = []

    def sleep(seconds):
        pages.append((folder / "report.html").read_text())
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(make_record(4)) + "\n")
        content = {"status": "complete", "step": 4, "reason": "training.steps are done", "time": time.time()}
        (folder / "status.json").write_text(json.dumps(content))

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert report.main([str(folder), "--watch", "7"]) == 0
    assert len(pages) == 1
    assert '<meta http-equiv="refresh" content="7">' in pages[0]
    assert "step 3 of 10,000 was logged last" in pages[0]
    last = (folder / "report.html").read_text()
    assert "http-equiv" not in last
    assert "training.steps are done (step 4)" in last


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "there is no metrics.jsonl. Name a run's job.dump_folder" in capsys.readouterr().err
    with pytest.raises(RunReadError, match="no step is logged"):
        load_run(write_run(tmp_path / "empty", []))
