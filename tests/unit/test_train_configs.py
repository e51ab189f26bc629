"""The TOML files that come with the program, and those of torchtitan's users."""

from pathlib import Path

import pytest

from trainer import train
from trainer.config.manager import load_config
from trainer.config.validate import find_problems

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted((ROOT / "train_configs").glob("*.toml"))
THEIRS = sorted((ROOT / "tests" / "assets" / "torchtitan").glob("*.toml"))
WORLD_SIZES = {
    "debug_deepseek_v3": [1, 8],
    "debug_llama3": [1, 8],
    "deepseek_v3_16b": [8, 16],
    "deepseek_v3_236b": [64],
    "deepseek_v3_671b": [256],
    "llama3_1b": [8],
    "llama3_3b": [8],
    "llama3_8b": [8, 16],
    "llama3_8b_float8": [8, 16],
    "llama3_70b": [32, 64, 512],
    "llama3_405b": [128, 256, 8192],
}


def answer(path, world_size, monkeypatch, *argv):
    """Exit code of `--job.validate_only` with a tokenizer that is there."""
    monkeypatch.setattr(train, "setup_logging", lambda **_: None)
    arguments = ["--job.config_file", str(path), "--model.hf_assets_path=byte", "--job.validate_only", *argv]
    return train.main(arguments, {"WORLD_SIZE": str(world_size)})


@pytest.mark.parametrize(
    ("path", "world_size"),
    [pytest.param(path, size, id=f"{path.stem}-{size}") for path in OURS for size in WORLD_SIZES[path.stem]],
)
def test_our_config_is_in_order(path, world_size, monkeypatch, caplog):
    loaded = load_config(["--job.config_file", str(path)])
    assert loaded.problems == []
    assert loaded.warnings == []
    assert find_problems(loaded.config, world_size=world_size) == ([], [])
    assert answer(path, world_size, monkeypatch) == 0
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "world_size", "expected"),
    [("llama3_70b", 36, "multiple of 8 processes"), ("llama3_405b", 64, "multiple of 128 processes")],
)
def test_our_config_on_too_few_processes_says_how_many(name, world_size, expected, monkeypatch, capsys):
    assert answer(ROOT / "train_configs" / f"{name}.toml", world_size, monkeypatch) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_config_names_only_what_differs(path):
    loaded = load_config(["--job.config_file", str(path)])
    defaults = load_config([]).config
    extends = "extends" in path.read_text()
    for key, origin in loaded.origins.items():
        if origin.startswith(f"{path}:") and not extends:
            value, default = loaded.config, defaults
            for part in key.split("."):
                value, default = getattr(value, part), getattr(default, part)
            # Sizes of the debug run's batches are part of its story, default or not.
            assert value != default or "batch_size" in key, f"{origin}: {key} = {value} is the default"


def test_configs_are_there():
    names = {path.stem for path in OURS}
    assert names >= {"debug_llama3", "llama3_1b", "llama3_3b", "llama3_8b", "llama3_70b", "llama3_405b"}
    assert len(THEIRS) == 4


NOT_AVAILABLE = {
    "debug_model": [],
    "llama3_8b": [],
    "llama3_70b": [],
    "llama3_405b": [],
}


@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.stem)
def test_torchtitan_config_loads_unchanged(path, monkeypatch, tmp_path):
    loaded = load_config(["--job.config_file", str(path)])
    assert loaded.problems == []
    assert loaded.warnings == []
    # Twice the ranks of the 405B file's tensor parallelism, so that there is something to shard over.
    problems, warnings = find_problems(loaded.config, world_size=16)
    assert [key for problem in problems for key in problem.keys] == NOT_AVAILABLE[path.stem]
    assert warnings == []
    without_converters = answer(path, 8, monkeypatch, "--model.converters=", f"--job.dump_folder={tmp_path}")
    assert without_converters == 0
    assert loaded.config.model.name == "llama3"
    assert len([origin for origin in loaded.origins.values() if origin.startswith(str(path))]) > 30
