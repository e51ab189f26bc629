"""What a difference between the settings of a checkpoint and those of a run means."""

import dataclasses
import fnmatch
import json
from dataclasses import replace

import pytest

from models.llama3.args import LlamaArgs
from trainer.config.changes import (
    CHECKED_ELSEWHERE,
    HARMLESS,
    OF_A_HOST,
    RESULT,
    ROUNDING,
    describe_sections,
    describe_settings,
    find_changes,
    find_refused,
)
from trainer.config.fields import build_config, get_leaves
from trainer.config.schema import JobConfig
from trainer.config.schema_training import SourceConfig

ARGS = LlamaArgs()


def settings_of(args=ARGS, batch: int = 8, **values) -> dict:
    config = build_config({key.replace("__", "."): value for key, value in values.items()})
    return describe_settings(config, args, global_batch_size=batch)


BEFORE = settings_of()


def test_settings_are_all_there_and_json_gives_them_back():
    settings = settings_of(data__sources=[SourceConfig("text", weight=2.0)])
    assert get_leaves().keys() < settings.keys()
    assert settings["model_args.dim"] == 4096
    assert json.loads(json.dumps(settings)) == settings
    assert find_changes(settings, settings) == []
    assert describe_settings(JobConfig(), object(), global_batch_size=8).keys() == get_leaves().keys()


@pytest.mark.parametrize("glob", [*HARMLESS, *ROUNDING, *CHECKED_ELSEWHERE, *OF_A_HOST])
def test_each_glob_matches_a_setting(glob):
    assert fnmatch.filter(get_leaves(), glob)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job__dump_folder", "/elsewhere"),
        ("checkpoint__interval", 7),
        ("metrics__log_freq", 1),
        ("training__nonfinite_policy", "skip"),
        ("training__spike_policy", "rollback"),
        ("parallelism__tensor_parallel_degree", 2),
        ("training__local_batch_size", 2),
        ("compile__enable", True),
        ("training__dataset_path", "/elsewhere"),
        ("validation__enable", True),
    ],
)
def test_change_that_leaves_the_result_is_shown_and_not_refused(key, value):
    (change,) = find_changes(BEFORE, settings_of(**{key: value}))
    assert change.key == key.replace("__", ".")
    assert change.meaning != RESULT
    assert find_refused([change], allowed=[], excluded=[]) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer__lr", 1e-4),
        ("optimizer__no_decay", ["*norm*"]),
        ("training__max_norm", 0.5),
        ("training__mixed_precision_param", "float32"),
        ("training__seq_len", 128),
        ("model__flavor", "8B"),
        ("model__attn_mask_type", "block_causal"),
        ("lr_scheduler__warmup_steps", 3),
        ("debug__moe_force_load_balance", True),
        ("experimental__custom_import", "mine"),
    ],
)
def test_change_of_the_result_is_refused_unless_it_is_said_to_be_meant(key, value):
    changes = find_changes(BEFORE, settings_of(**{key: value}))
    key = key.replace("__", ".")
    assert [change.key for change in find_refused(changes, allowed=[], excluded=[])] == [key]
    assert str(changes[0]).startswith(f"{key}: ")
    for allowed in (key, key.split(".")[0] + ".*", "*"):
        assert find_refused(changes, allowed=[allowed], excluded=[]) == []
    assert find_refused(changes, allowed=["optimizer.beta*"], excluded=[]) == changes


@pytest.mark.parametrize(
    ("key", "value", "sections"),
    [
        ("training.max_norm", 0.5, {"[training]"}),
        ("training.steps", 7, {"[training]"}),
        ("metrics.log_freq", 7, {"[metrics]"}),
        ("optimizer.muon.lr", 0.1, {"[optimizer]"}),
        ("job.dump_folder", "/elsewhere", set()),
        ("checkpoint.initial_load_path", "/elsewhere", set()),
        ("data.cache_dir", "/elsewhere", set()),
    ],
)
def test_ranks_must_have_all_alike_but_places(key, value, sections):
    before, now = (describe_sections(build_config(values)) for values in ({}, {key: value}))
    assert {name for name in before if before[name] != now[name]} == sections


def test_batch_is_compared_by_all_its_sequences():
    """With global_batch_size = -1 it changes with the number of ranks, which no setting tells."""
    (change,) = find_changes(BEFORE, settings_of(batch=4))
    assert (change.key, change.before, change.now, change.meaning) == ("training.global_batch_size", 8, 4, RESULT)


def test_sizes_of_the_network_are_compared_and_not_its_name_alone():
    (change,) = find_changes(BEFORE, settings_of(replace(ARGS, rope_theta=1e4)))
    assert (change.key, change.meaning) == ("model_args.rope_theta", RESULT)
    assert find_changes(BEFORE, settings_of(replace(ARGS, max_seq_len=4096))) == []


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({"training__steps": 100}, {"training__steps": 200}, False),  # the schedule is laid out anew, and that is said
        ({"training__steps": 200}, {"training__steps": 100}, True),
        ({"training__steps": 100}, {"training__steps": 200, "lr_scheduler__total_steps": 100}, False),
        ({"training__steps": 100}, {"training__steps": 200, "lr_scheduler__total_steps": 200}, True),
        ({"lr_scheduler__total_steps": 100}, {"lr_scheduler__total_steps": 150}, True),
        ({"lr_scheduler__total_steps": 50}, {"lr_scheduler__total_steps": 50, "training__steps": 7}, False),
    ],
)
def test_steps_count_by_the_schedule_that_they_set(before, now, refused):
    changes = find_changes(settings_of(**before), settings_of(**now))
    found = find_refused(changes, allowed=[], excluded=[])
    assert [change.key for change in found] == (["lr_scheduler.total_steps"] if refused else [])
    assert changes, "it is shown"


def test_part_that_begins_afresh_has_no_settings_to_keep():
    changes = find_changes(BEFORE, settings_of(optimizer__lr=1.0, training__max_norm=0.1))
    assert [change.key for change in find_refused(changes, allowed=[], excluded=["optimizer"])] == ["training.max_norm"]


def test_setting_that_the_older_program_did_not_have_had_its_default():
    before = {key: value for key, value in BEFORE.items() if key != "training.max_norm"}
    assert find_changes(before, BEFORE) == []
    (change,) = find_changes(before, settings_of(training__max_norm=0.3))
    assert dataclasses.astuple(change)[:3] == ("training.max_norm", 1.0, 0.3)
