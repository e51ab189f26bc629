"""Ranges, rules across sections, and what this version does not have."""

import os
import types
import typing

import pytest

from trainer.config import unavailable, validate
from trainer.config.fields import get_item_section, get_leaves, get_type_hints, get_value
from trainer.config.manager import load_config
from trainer.config.ranges import ITEM_RANGES, RANGES, Range
from trainer.config.validate import find_problems


def find(*argv, world_size=None):
    loaded = load_config(argv)
    assert [str(p) for p in loaded.problems] == []
    problems, warnings = find_problems(loaded.config, world_size=world_size)
    return [str(p) for p in problems], [str(w) for w in warnings]


def is_numeric(annotation):
    return bool({int, float} & {annotation, *typing.get_args(annotation)})


def test_every_numeric_field_has_a_range():
    assert RANGES.keys() == {key for key, leaf in get_leaves().items() if is_numeric(leaf.type)}
    lists = {key: get_item_section(leaf.type) for key, leaf in get_leaves().items() if get_item_section(leaf.type)}
    assert ITEM_RANGES.keys() == lists.keys()
    for key, section in lists.items():
        numeric = {name for name, annotation in get_type_hints(section).items() if is_numeric(annotation)}
        assert ITEM_RANGES[key].keys() == numeric


def test_defaults_are_in_order():
    assert find() == ([], [])
    assert find(world_size=8) == ([], [])


@pytest.mark.parametrize(
    ("value", "allowed", "inside"),
    [
        (0, Range(low=0), True),
        (-1, Range(low=0), False),
        (0, Range(above=0), False),
        (1, Range(high=1), True),
        (1, Range(below=1), False),
        (-1, Range(low=1, special=-1), True),
        (0, Range(low=1, special=-1), False),
    ],
)
def test_range_ends(value, allowed, inside):
    assert (value in allowed) is inside


@pytest.mark.parametrize("key", sorted(RANGES))
def test_value_outside_its_range_is_refused(key):
    allowed = RANGES[key]
    bad = next(v for v in (-2, allowed.above, allowed.below) if v is not None and v not in allowed)
    problems, _ = find(f"--{key}={bad}")
    (problem,) = [p for p in problems if p.startswith(f"{key} = ")]
    assert str(bad) in problem
    assert f"must be {allowed}" in problem


def test_number_in_a_list_of_tables_outside_its_range_is_refused():
    problems, _ = find("--data.sources", '[{dataset = "c4"}, {dataset = "c4", weight = 0}]')
    assert problems == ["data.sources, item 2: weight = 0.0: must be above 0."]


@pytest.mark.parametrize(
    ("argv", "world_size", "expected"),
    [
        (["--training.global_batch_size=100"], 8, ["8 x 8 = 64", "Use 64 or 128"]),
        (["--training.global_batch_size=32"], 8, ["8 x 8 = 64", "Use 64,"]),
        (
            ["--training.global_batch_size=20", "--parallelism.data_parallel_replicate_degree=2"],
            2,
            ["8 x 2 = 16", "Use 16 or 32"],
        ),
        (["--parallelism.data_parallel_replicate_degree=3"], 8, ["multiply to 3", "8 processes"]),
        (["--parallelism.data_parallel_shard_degree=4"], 8, ["multiply to 4", "8 processes", "NGPU=4"]),
        (["--parallelism.data_parallel_shard_degree=1"], 2, ["multiply to 1", "data_parallel_shard_degree = -1"]),
        (
            ["--parallelism.data_parallel_shard_degree=2", "--parallelism.data_parallel_replicate_degree=8"],
            8,
            ["multiply to 16"],
        ),
    ],
)
def test_world_size_rule(argv, world_size, expected):
    (problem,), _ = find(*argv, world_size=world_size)
    for word in expected:
        assert word in problem
    assert find(*argv) == ([], [])


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        (["--training.global_batch_size=128"], 8),
        (["--parallelism.data_parallel_replicate_degree=2"], 8),
        (["--parallelism.data_parallel_replicate_degree=8", "--parallelism.data_parallel_shard_degree=1"], 8),
        (["--parallelism.data_parallel_shard_degree=8"], 8),
    ],
)
def test_world_size_rule_is_met(argv, world_size):
    assert find(*argv, world_size=world_size) == ([], [])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--job.time_limit=3h"], ["job.time_limit = 3h", "such as 3:50:00"]),
        (["--job.time_limit=0:00:00"], ["job.time_limit = 0:00:00", "above 0"]),
        (
            ["--training.nonfinite_policy=rollback"],
            ["training.nonfinite_policy = rollback", "checkpoint.enable = true"],
        ),
        (
            ["--training.spike_policy=rollback", "--checkpoint.enable", "--checkpoint.load_only"],
            ["training.spike_policy = rollback", "not load_only"],
        ),
        (
            ["--data.streaming", "--data.read_timeout_seconds=100"],
            ["data.read_timeout_seconds = 100", "below comm.train_timeout_seconds = 100"],
        ),
        (["--data.streaming", "--data.packing=best_fit"], ["data.packing = best_fit", "data.streaming = false"]),
        (["--data.streaming", "--training.dataset=prepared"], ["prepared token files", "data.streaming = false"]),
        (
            ["--data.streaming", "--data.sources", '[{dataset = "c4"}, {dataset = "text"}]'],
            ["2 sources", "data.streaming = true reads one"],
        ),
        (["--checkpoint.load_step=3"], ["checkpoint.load_step = 3", "checkpoint.enable = true"]),
        (["--checkpoint.load_only"], ["checkpoint.load_only = true", "checkpoint.enable = true"]),
        (["--checkpoint.create_seed_checkpoint"], ["checkpoint.enable = true"]),
        (["--checkpoint.initial_load_path=x"], ["checkpoint.initial_load_path = x", "checkpoint.enable = true"]),
        (["--checkpoint.initial_load_in_hf"], ["checkpoint.initial_load_in_hf = true", "checkpoint.enable = true"]),
        (
            ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"],
            ["checkpoint.last_save_in_hf = true", "checkpoint.enable = true"],
        ),
        (["--checkpoint.enable", "--checkpoint.last_save_in_hf"], ["needs checkpoint.last_save_model_only = true"]),
        (
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_model_only=false"],
            ["needs checkpoint.initial_load_model_only = true"],
        ),
        (["--checkpoint.enable", "--checkpoint.initial_load_path=/no/where"], ["/no/where", "no such folder"]),
        (["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.create_seed_checkpoint"], ["Set one"]),
        (["--checkpoint.exclude_from_loading=optimiser"], ["Did you mean optimizer?"]),
        (["--checkpoint.allow_config_change=optimizer.lrr"], ["optimizer.lrr matches no setting", "optimizer.lr?"]),
        (["--job.dump_folder=s3://bucket/run"], ["job.dump_folder", "on a disk", "checkpoint.remote_folder"]),
        (["--checkpoint.folder=s3://bucket/run"], ["checkpoint.folder", "checkpoint.remote_folder"]),
        (["--checkpoint.enable", "--checkpoint.remote_folder=/a/disk"], ["must be a URL", "job.dump_folder"]),
        (["--checkpoint.remote_folder=s3://bucket/run"], ["needs checkpoint.enable = true"]),
        (["--activation_checkpoint.mode=memory_budget"], ["must be compiled"]),
        (
            ["--activation_checkpoint.mode=memory_budget", "--compile.enable", "--compile.components=loss"],
            ["must be compiled"],
        ),
        (["--activation_checkpoint.selective_ac_option=0"], ["op or a number from 1 on"]),
        (["--activation_checkpoint.selective_ac_option=ops"], ["op or a number from 1 on"]),
        (["--activation_checkpoint.determinism_check=non"], ["Did you mean none?"]),
        (
            ["--activation_checkpoint.debug", "--activation_checkpoint.selective_ac_option=op"],
            ["activation_checkpoint.debug = true", "mode = full"],
        ),
        (["--compile.enable", "--compile.components="], ["name model, loss or both"]),
        (["--profiling.enable_profiling", "--profiling.profile_freq=3"], ["3 + 1 = 4"]),
        (["--training.dataset="], ["training.dataset", "must not be empty"]),
        (["--job.save_config_file="], ["job.save_config_file", "must not be empty"]),
        (["--optimizer.param_groups", "[{lr_scale = 0.1}]"], ["optimizer.param_groups, item 1", "match is missing"]),
        (["--optimizer.no_decay", '["*norm*", ""]'], ["optimizer.no_decay", "empty pattern"]),
        (["--data.sources", "[{weight = 1}]"], ["data.sources, item 1", "dataset is missing"]),
        (["--data.sources", '[{dataset = "text"}, {dataset = "text"}]'], ["called text", "its own name"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(argv, expected):
    (problem,), _ = find(*argv)
    for word in expected:
        assert word in problem


@pytest.mark.parametrize("key", ["remote_folder", "initial_load_path"])
@pytest.mark.parametrize(
    "url", ["s3://me:hush@bucket/run", "https://host/run?api_key=hush", "az://run?x=1&sig=hush", "s3://hush@bucket"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(key, url):
    (problem,), _ = find("--checkpoint.enable", f"--checkpoint.{key}", url)
    assert "would be written down" in problem
    assert "hush" not in problem


def test_credentials_are_found_in_any_setting():
    (problem,), _ = find("--data.sources", '[{dataset = "text", path = "https://me:hush@host/x"}]')
    assert problem.startswith("data.sources: the URL has a user or password in it")
    assert find("--job.description", "what? key=1, mail me@host", "--validation.dataset_path=/a@b/c") == ([], [])


def test_urls_and_globs_in_their_place_are_in_order():
    urls = ["--checkpoint.remote_folder=s3://bucket/run", "--checkpoint.initial_load_path=gs://bucket/other/step-3"]
    allowed = ["--checkpoint.allow_config_change", "optimizer.*", "model_args.rope_theta", "training.max_norm"]
    assert find("--checkpoint.enable", *urls, *allowed) == ([], [])


def test_memory_budget_with_a_compiled_model_is_in_order():
    assert find("--activation_checkpoint.mode=memory_budget", "--compile.enable") == ([], [])


def test_dump_folder_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    (problem,), _ = find("--job.dump_folder", str(tmp_path / "file" / "run"))
    assert "is a file" in problem
    if os.getuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        (problem,), _ = find("--job.dump_folder", str(locked / "run"))
        assert "no permission" in problem
    assert find("--job.dump_folder", str(tmp_path / "new" / "run")) == ([], [])


@pytest.mark.parametrize("key", ["metrics.enable_wandb", "metrics.enable_tensorboard"])
def test_missing_package_is_named(monkeypatch, key):
    monkeypatch.setattr(validate.importlib.util, "find_spec", lambda name: None)
    problems, _ = find(f"--{key}")
    (problem,) = [p for p in problems if p.startswith(key)]
    assert "pip install" in problem


REFUSED_VALUES = {
    "model.converters": "quantize.linear.mx",
    "quantize.grouped_mm.float8.fqns": "experts",
    "comm.mode": "fake_backend",
    "job.custom_config_module": "mine",
    "experimental.custom_args_module": "mine",
    "checkpoint.async_mode": "async_with_pinned_mem",
}


@pytest.mark.parametrize("key", [refusal.key for refusal in unavailable.REFUSED])
def test_what_is_not_there_is_refused_with_a_reason(key):
    problems, _ = find(f"--{key}={REFUSED_VALUES.get(key, 'true')}", world_size=8)
    (problem,) = [p for p in problems if p.startswith(f"{key} = ")]
    assert len(problem.split(": ", 1)[1]) > 20


@pytest.mark.parametrize("key", sorted(unavailable.WITHOUT_EFFECT))
def test_setting_without_effect_is_warned_about_once(key):
    leaf = get_leaves()[key]
    if leaf.type is bool:
        value = str(not leaf.default).lower()
    elif key == "parallelism.module_fqns_per_model_part":
        value = '[["a"]]'
    elif typing.get_origin(leaf.type) is typing.Literal:
        value = next(choice for choice in typing.get_args(leaf.type) if choice != leaf.default)
    elif leaf.type is str:
        value = "other"
    else:
        value = "none" if types.NoneType in typing.get_args(leaf.type) and leaf.default is not None else "3"
    problems, warnings = find(f"--{key}={value}")
    assert problems == []
    (warning,) = warnings
    assert warning.startswith(f"{key} = ")
    assert "has no effect" in warning


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lr_scheduler.total_steps=10", "--training.steps=20"], "stays at its end value"),
        (["--checkpoint.enable", "--checkpoint.last_save_model_only"], "cannot be prolonged"),
        (["--debug.deterministic_warn_only"], "has no effect"),
        (["--validation.enable", "--training.dataset=c4"], "no held-out part of what the run is trained on (c4)"),
        (["--activation_checkpoint.visualize_memory_budget_pareto"], "has no effect"),
        (["--data.sources", '[{dataset = "c4"}]', "--training.dataset_path=x"], "has no effect"),
    ],
)
def test_misleading_settings_are_warned_about(argv, expected):
    problems, (warning,) = find(*argv)
    assert problems == []
    assert expected in warning


def test_all_problems_come_at_once_and_no_rule_repeats_one():
    argv = ["--training.steps=0", "--training.local_batch_size=0", "--training.global_batch_size=7"]
    argv += ["--checkpoint.load_step=-2", "--parallelism.data_parallel_shard_degree=3", "--compile.enable"]
    argv += ["--compile.components="]
    problems, _ = find(*argv, world_size=8)
    assert len(problems) == 5


def test_rules_about_a_value_that_could_not_be_read_are_left_out():
    loaded = load_config(["--checkpoint.load_step=3", "--checkpoint.enable=maybe"])
    problems, _ = find_problems(loaded.config, world_size=None, broken_keys=loaded.broken_keys)
    assert problems == []


def test_find_problems_never_fails_on_any_single_change():
    for key, leaf in get_leaves().items():
        value = {bool: "true", str: "x", int: "7", float: "0.7"}.get(leaf.type, "none")
        loaded = load_config([f"--{key}={value}"])
        find_problems(loaded.config, world_size=4, broken_keys=loaded.broken_keys)
        get_value(loaded.config, key)
