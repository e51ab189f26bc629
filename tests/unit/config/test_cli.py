"""Dotted overrides."""

import pytest

from trainer.config.cli import read_arguments
from trainer.config.schema_training import SourceConfig


def read(*argv):
    settings = read_arguments(argv)
    assert [str(p) for p in settings.problems] == []
    return {key: setting.value for key, setting in settings.values.items()}


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--training.steps", "5"], "training.steps", 5),
        (["--training.steps=5"], "training.steps", 5),
        (["--training.steps", "1e3"], "training.steps", 1000),
        (["--training.steps", "5", "--training.steps", "6"], "training.steps", 6),
        (["--training.seq-len", "5"], "training.seq_len", 5),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable", "true"], "compile.enable", True),
        (["--compile.enable=True"], "compile.enable", True),
        (["--compile.enable=false"], "compile.enable", False),
        (["--compile.enable", "false"], "compile.enable", False),
        (["--compile.no-enable"], "compile.enable", False),
        (["--compile.no_enable"], "compile.enable", False),
        (["--profiling.no-enable_profiling"], "profiling.enable_profiling", False),
        (["--compile.enable", "--compile.no_enable"], "compile.enable", False),
        (["--optimizer.no_decay", "*norm*"], "optimizer.no_decay", ["*norm*"]),
        (["--compile.components", "model", "loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", "model,loss"], "compile.components", ["model", "loss"]),
        (["--compile.components=model,loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", '["loss"]'], "compile.components", ["loss"]),
        (["--compile.components", "['loss']"], "compile.components", ["loss"]),
        (["--compile.components="], "compile.components", []),
        (["--compile.components", "[]"], "compile.components", []),
        (["--job.description", "a, b"], "job.description", "a, b"),
        (["--job.description=a=b"], "job.description", "a=b"),
        (["--job.description", "3"], "job.description", "3"),
        (["--job.description="], "job.description", ""),
        (["--debug.seed", "none"], "debug.seed", None),
        (["--training.dataset_path", "None"], "training.dataset_path", None),
        (["--quantize.linear.float8.recipe-name", "rowwise"], "quantize.linear.float8.recipe_name", "rowwise"),
        (
            ["--parallelism.module_fqns_per_model_part", '[["a", "b"], ["c"]]'],
            "parallelism.module_fqns_per_model_part",
            [["a", "b"], ["c"]],
        ),
        (
            ["--data.sources", '[{dataset = "c4", weight = 2}]'],
            "data.sources",
            [SourceConfig(dataset="c4", weight=2.0)],
        ),
        (
            ["--data.sources", '{"dataset": "c4"}', '{dataset = "text"}'],
            "data.sources",
            [SourceConfig(dataset="c4"), SourceConfig(dataset="text")],
        ),
    ],
)
def test_spelling_is_understood(argv, key, expected):
    values = read(*argv)
    assert values == {key: expected}
    assert type(values[key]) is type(expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--training.step", "5"], "unknown setting --training.step. Did you mean training.steps?"),
        (["--compil.enable"], "Did you mean compile.enable?"),
        (["--training"], "--training is a section"),
        (["--training.steps"], "expected one value, got none"),
        (["--training.steps", "1", "2"], "expected one value, got 2: 1 2"),
        (["--training.steps", "many"], 'expected an integer, got the string "many"'),
        (["--training.steps="], "expected an integer"),
        (["--training.steps", "1.5"], "expected an integer, got the number 1.5"),
        (["--optimizer.lr", "nan"], "expected a finite number"),
        (["--compile.enable", "maybe"], "expected true or false"),
        (["--compile.no-enable", "false"], "takes no value"),
        (["--compile.components", "model", "los"], "Did you mean loss?"),
        (["--training.dtype", "float64"], "expected float32 or bfloat16"),
        (["--data.sources", "c4"], "neither a TOML nor a JSON value"),
        (["--data.sources", '[{dataset = "c4", path = 3}]'], "item 1: path: expected a string"),
        (["--data.sources", '[]\n[job]\ndescription = "x"'], "not one TOML value"),
        (["train.toml"], "stands alone"),
        (["--training.no-steps"], "unknown setting"),
    ],
)
def test_mistake_is_explained(argv, expected):
    settings = read_arguments(argv)
    (problem,) = settings.problems
    assert str(problem).startswith("command line: ")
    assert expected in str(problem)
    assert not settings.values


def test_later_mistake_discards_an_earlier_value_of_the_key():
    settings = read_arguments(["--training.steps", "5", "--training.steps", "x"])
    assert "training.steps" not in settings.values
    assert settings.problems[0].keys == ("training.steps",)
