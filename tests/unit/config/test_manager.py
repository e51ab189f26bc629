"""Precedence, origins, and the resolved config that starts a run again."""

import dataclasses

import pytest
import tomli

from trainer.config.fields import get_leaves, get_sections, get_value
from trainer.config.manager import load_config
from trainer.config.render import format_config, format_value, write_config
from trainer.config.schema import JobConfig


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "base.toml").write_text("[training]\nsteps = 1\nseq_len = 64\nlocal_batch_size = 2\n")
    path = tmp_path / "run.toml"
    path.write_text("extends = 'base.toml'\n[training]\nseq_len = 128\nlocal_batch_size = 4\n")
    return path


def test_precedence_is_default_then_file_then_command_line(config_file):
    loaded = load_config(["--training.local_batch_size", "8", "--job.config_file", str(config_file)])
    training = loaded.config.training
    assert loaded.problems == []
    assert (training.max_norm, training.steps, training.seq_len, training.local_batch_size) == (1.0, 1, 128, 8)
    assert loaded.config.job.config_file == str(config_file)
    assert loaded.origins["training.max_norm"] == "default"
    assert loaded.origins["training.steps"] == f"{config_file.parent / 'base.toml'}:2"
    assert loaded.origins["training.seq_len"] == f"{config_file}:3"
    assert loaded.origins["training.local_batch_size"] == "command line"
    assert loaded.origins.keys() == get_leaves().keys()


def test_load_config_without_arguments_gives_the_defaults():
    assert load_config([]).config == JobConfig()


def test_load_config_collects_problems_of_file_and_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nstep = 1\nseq_len = 'x'\n")
    loaded = load_config(["--job.config_file", str(path), "--optimizer.lr", "x"])
    assert len(loaded.problems) == 3
    assert loaded.broken_keys == {"training.seq_len", "optimizer.lr"}


def test_load_config_does_not_share_lists_between_configs():
    load_config([]).config.compile.components.append("oops")
    assert load_config([]).config.compile.components == ["model", "loss"]


def test_deprecated_tokenizer_path_stands_for_hf_assets_path():
    loaded = load_config(["--model.tokenizer_path", "folder"])
    assert loaded.config.model.hf_assets_path == "folder"
    assert "deprecated" in str(loaded.warnings[0])
    loaded = load_config(["--model.tokenizer_path", "folder", "--model.hf_assets_path", "other"])
    assert loaded.config.model.hf_assets_path == "other"
    assert "ignored" in str(loaded.warnings[0])


EVERY_KIND = [
    "--job.description", 'quotes " and \\ and \n and \x7f and \u00e9',
    "--optimizer.eps", "1e-15",
    "--optimizer.lr", "3",
    "--training.steps", "1e3",
    "--compile.enable",
    "--metrics.no-enable_tensorboard",
    "--compile.components", "loss",
    "--model.converters=",
    "--debug.seed", "7",
    "--parallelism.context_parallel_load_balancer", "none",
    "--parallelism.module_fqns_per_model_part", '[["a"], ["b", "c"]]',
    "--data.sources", '[{dataset = "c4", weight = 0.1}, {dataset = "text", path = "a b"}]',
    "--optimizer.param_groups", '[{match = "*norm*", weight_decay = 0.0}]',
    "--quantize.linear.float8.filter_fqns", "output,x",
]  # fmt: skip


def test_write_config_round_trips(tmp_path):
    loaded = load_config(EVERY_KIND)
    assert loaded.problems == []
    path = tmp_path / "dump" / "config.toml"
    write_config(loaded.config, path, origins=loaded.origins)
    again = load_config(["--job.config_file", str(path)])
    assert again.problems == []
    assert dataclasses.replace(again.config, job=loaded.config.job).job == loaded.config.job
    assert again.config == dataclasses.replace(
        loaded.config, job=dataclasses.replace(loaded.config.job, config_file=str(path))
    )
    assert [p.name for p in path.parent.iterdir()] == ["config.toml"]


def test_write_config_leaves_an_existing_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("old")

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_config(JobConfig(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_format_config_notes_the_origin_of_what_was_set(config_file):
    loaded = load_config(["--job.config_file", str(config_file), "--compile.enable", "--debug.seed", "none"])
    lines = format_config(loaded).splitlines()
    assert f"seq_len = 128  # {config_file}:3" in lines
    assert "max_norm = 1.0" in lines
    compile_section = lines[lines.index("[compile]") :]
    assert compile_section[1] == "enable = true  # command line"
    assert not any(line.startswith(("config_file", "seed")) for line in lines)


def test_format_config_writes_each_section_once_and_every_value():
    text = format_config(load_config([]))
    document = tomli.loads(text)
    for key, leaf in get_leaves().items():
        value = document
        for part in key.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else value
        if leaf.default is not None:
            assert value == leaf.default, key
    headers = [line for line in text.splitlines() if line.startswith("[")]
    assert len(headers) == len(set(headers)) <= len(get_sections())


@pytest.mark.parametrize("value", [1e-8, 1e22, 0.1, -5, True, "a\tb\u0000\u2028", ["x", "y"], [["a"], []], 123456789.0])
def test_format_value_parses_back(value):
    parsed = tomli.loads(f"v = {format_value(value)}")["v"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_get_value_reads_every_leaf():
    config = JobConfig()
    for key, leaf in get_leaves().items():
        assert get_value(config, key) == leaf.default
