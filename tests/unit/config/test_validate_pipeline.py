"""Pipelines that cannot run, as far as no model is needed to know: schedules, their files, batches, and what they do not go with."""

import pytest

from trainer.config import validate_pipeline
from trainer.config.manager import load_config
from trainer.config.schedules import list_schedules
from trainer.config.validate import find_problems
from trainer.config.validate_pipeline import REFUSED_WITH_SPLIT_BACKWARD

PP = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
CSV = "parallelism.pipeline_parallel_schedule_csv"
MICROBATCH = "parallelism.pipeline_parallel_microbatch_size"
BATCH = "training.local_batch_size"
FIRST_LESS = "parallelism.pipeline_parallel_first_stage_less_layers"
LAST_LESS = "parallelism.pipeline_parallel_last_stage_less_layers"
MODE = "activation_checkpoint.mode"
PARTS = "parallelism.module_fqns_per_model_part"
SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def find(settings):
    loaded = load_config([f"--{key}={value}" for key, value in {PP: 2, MODE: "none", **settings}.items()])
    assert [str(p) for p in loaded.problems] == []
    problems, warnings = find_problems(loaded.config, world_size=None)
    return [str(p) for p in problems], [str(w) for w in warnings]


@pytest.fixture
def schedule_file(tmp_path):
    """Writes a schedule; by default 1F1B on two ranks with two microbatches."""

    def write(text="0F0,0F1,0B0,0B1\n,1F0,1B0,1F1,1B1\n"):
        path = tmp_path / "schedule.csv"
        path.write_text(text)
        return str(path)

    return write


def test_unknown_schedule_is_refused_with_the_nearest_name():
    (problem,), _ = find({SCHEDULE: "interleaved1f1"})
    for words in (f"{SCHEDULE} = interleaved1f1", "Did you mean Interleaved1F1B?", *list_schedules()):
        assert words in problem


@pytest.mark.parametrize("name", [*list_schedules(), "1f1b", "zbvzerobubble"])
def test_known_schedule_is_in_order(name):
    assert find({SCHEDULE: name}) == ([], [])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({BATCH: 9, MICROBATCH: 2}, [f"{BATCH} = 9: must be a multiple of {MICROBATCH} = 2", "Use 8 or 10,"]),
        ({BATCH: 1, MICROBATCH: 2}, [f"{BATCH} = 1: must be a multiple of {MICROBATCH} = 2", "Use 2,"]),
        (
            {BATCH: 8, MICROBATCH: 4, "validation.enable": "true", "validation.local_batch_size": 6},
            [f"validation.local_batch_size = 6: must be a multiple of {MICROBATCH} = 4", "Use 4 or 8,"],
        ),
    ],
)
def test_batch_that_is_no_multiple_of_the_microbatch_is_refused(settings, expected):
    (problem,), _ = find(settings)
    for words in expected:
        assert words in problem


def test_batch_of_validation_counts_when_there_is_any():
    assert find({BATCH: 8, MICROBATCH: 4, "validation.local_batch_size": 6}) == ([], [])
    settings = {BATCH: 8, MICROBATCH: 4, "validation.enable": "true", "validation.local_batch_size": 4}
    assert find(settings) == ([], [])


@pytest.mark.parametrize(
    ("settings", "microbatches", "remedy"),
    [
        ({SCHEDULE: "Interleaved1F1B", PP: 4, BATCH: 9}, 9, f"{BATCH} = 8 or 10 would do"),
        ({SCHEDULE: "InterleavedZeroBubble", PP: 4, BATCH: 18, MICROBATCH: 2}, 9, f"{BATCH} = 16 or 20 would do"),
        ({SCHEDULE: "DualPipeV", PP: 4, BATCH: 7}, 7, f"{BATCH} = 8 would do"),
    ],
)
def test_number_of_microbatches_that_the_schedule_cannot_take_is_refused(settings, microbatches, remedy):
    (problem,), _ = find(settings)
    assert problem.startswith(f"{BATCH} = {settings[BATCH]}: ")
    for words in (f"{microbatches} microbatches", f"{SCHEDULE} = {settings[SCHEDULE]}", MICROBATCH, remedy):
        assert words in problem


@pytest.mark.parametrize(
    "settings",
    [
        {SCHEDULE: "Interleaved1F1B", PP: 4, BATCH: 8},
        {SCHEDULE: "Interleaved1F1B", PP: 4, BATCH: 10},
        {SCHEDULE: "Interleaved1F1B", PP: 4, BATCH: 3},
        {SCHEDULE: "DualPipeV", PP: 4, BATCH: 8},
        {SCHEDULE: "DualPipeV", PP: 4, BATCH: 16, MICROBATCH: 2},
        {SCHEDULE: "1F1B", PP: 4, BATCH: 4},
        {SCHEDULE: "GPipe", PP: 4, BATCH: 1},
        {SCHEDULE: "ZBVZeroBubble", PP: 4, BATCH: 5},
    ],
)
def test_number_of_microbatches_that_the_schedule_takes_is_in_order(settings):
    assert find(settings) == ([], [])


def test_file_with_a_schedule_is_in_order(schedule_file):
    assert find({CSV: schedule_file(), BATCH: 2}) == ([], [])


def test_file_with_another_number_of_microbatches_is_refused(schedule_file):
    (problem,), _ = find({CSV: schedule_file(), BATCH: 8})
    for words in (f"{BATCH} = 8", "8 microbatches", "exactly 2", f"{BATCH} = 2 would do"):
        assert words in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0F0,0B0\n", "needs 2 lines"),
        ("0F0,0X0\n1F0,1B0\n", "line 1, cell 2"),
        ("0F0\n1F0,1B0\n", "0B0"),
    ],
)
def test_file_that_is_no_schedule_is_refused(schedule_file, text, expected):
    path = schedule_file(text)
    (problem,), _ = find({CSV: path, BATCH: 1})
    assert problem.startswith(CSV)
    assert path in problem
    assert expected in problem


def test_file_that_is_not_there_is_refused(tmp_path):
    (problem,), _ = find({CSV: tmp_path / "none.csv"})
    assert problem.startswith(f"{CSV} = {tmp_path}/none.csv")
    (problem,), _ = find({CSV: tmp_path})
    assert problem.startswith(f"{CSV} = {tmp_path}")


def test_name_beside_a_file_is_warned_about(schedule_file):
    path = schedule_file()
    problems, (warning,) = find({CSV: path, BATCH: 2, SCHEDULE: "GPipe"})
    assert problems == []
    assert warning.startswith(f"{SCHEDULE} = GPipe has no effect")
    assert f"{CSV} = {path}" in warning
    # Even a name that is none, since it is not looked at.
    assert find({CSV: path, BATCH: 2, SCHEDULE: "no such schedule"})[0] == []


@pytest.mark.parametrize("key", [FIRST_LESS, LAST_LESS])
def test_cost_of_an_end_beside_named_stages_is_warned_about(key):
    problems, (warning,) = find({key: 1, PARTS: '[["a"], ["b"]]'})
    assert problems == []
    assert warning.startswith(f"{key} = 1 has no effect: ")
    assert PARTS in warning
    assert find({key: 1}) == ([], [])


# What brings each conflict about: nothing else that stands in the way of these settings alone.
SETTINGS_OF_CONFLICT = {
    "parallelism.fsdp_reshard_after_forward": {"parallelism.fsdp_reshard_after_forward": "always"},
}


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("conflict", REFUSED_WITH_SPLIT_BACKWARD, ids=lambda conflict: conflict.key)
def test_setting_that_does_not_go_with_a_split_backward_pass_is_refused(conflict, name):
    settings = SETTINGS_OF_CONFLICT[conflict.key]
    problems, warnings = find({**settings, SCHEDULE: name})
    assert warnings == []
    (problem,) = [p for p in problems if p.startswith(f"{conflict.key} = {settings[conflict.key]}: ")]
    for words in (name, conflict.reason, conflict.remedy, "GPipe, 1F1B, Interleaved1F1B or LoopedBFS"):
        assert words in problem
    assert find({**settings, SCHEDULE: "Interleaved1F1B"}) == ([], [])
    assert find({**settings, PP: 1})[0] == []


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_backward_pass_that_recomputation_keeps_whole_is_warned_about(mode):
    settings = {SCHEDULE: "ZBVZeroBubble", MODE: mode, "parallelism.fsdp_reshard_after_forward": "always"}
    problems, (warning,) = find(settings)
    assert problems == []
    assert warning.startswith(f"{SCHEDULE} = ZBVZeroBubble: ")
    assert f"{MODE} = {mode}" in warning
    assert find({**settings, SCHEDULE: "Interleaved1F1B"}) == ([], [])


def test_backward_pass_that_simple_fsdp_keeps_whole_is_warned_about():
    simple = "parallelism.data_parallel_implementation"
    problems, warnings = find({SCHEDULE: "ZBVZeroBubble", simple: "simple_fsdp"})
    assert problems == []
    assert any(warning.startswith(f"{SCHEDULE} = ") and f"{simple} = simple_fsdp" in warning for warning in warnings)


def test_loss_may_be_compiled_beside_a_split_backward_pass():
    assert find({SCHEDULE: "ZBVZeroBubble", "compile.enable": "true", "compile.components": "loss"}) == ([], [])


def test_file_that_splits_the_backward_pass_counts_as_such(schedule_file):
    path = schedule_file("0F0,0I0,0W0\n1F0,1B0\n")
    (problem,), _ = find({CSV: path, BATCH: 1, "parallelism.fsdp_reshard_after_forward": "always"})
    assert problem.startswith("parallelism.fsdp_reshard_after_forward = always: does not go with the schedule")
    assert path in problem


def test_table_of_conflicts_is_what_decides(monkeypatch):
    (first, *_) = REFUSED_WITH_SPLIT_BACKWARD
    monkeypatch.setattr(validate_pipeline, "REFUSED_WITH_SPLIT_BACKWARD", (first._replace(reason="for a test"),))
    (problem,), _ = find({SCHEDULE: "DualPipeV", "parallelism.fsdp_reshard_after_forward": "always"})
    assert "for a test" in problem


def test_everything_is_found_at_once():
    settings = {SCHEDULE: "DualPipeV", PP: 4, BATCH: 6, MICROBATCH: 2, "training.steps": 0}
    settings["parallelism.fsdp_reshard_after_forward"] = "always"
    problems, _ = find(settings)
    starts = ["training.steps = 0", f"{BATCH} = 6", "parallelism.fsdp_reshard_after_forward = always"]
    assert [p.startswith(start) for p, start in zip(problems, starts, strict=True)] == [True] * 3
