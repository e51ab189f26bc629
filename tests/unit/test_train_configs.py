"""The TOML files that come with the program, and those of torchtitan's users."""

from pathlib import Path

import pytest

from models.registry import get_model_spec
from trainer.config.manager import load_config
from trainer.config.validate import find_problems

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted((ROOT / "train_configs").glob("*.toml"))
THEIRS = sorted((ROOT / "tests" / "assets" / "torchtitan").glob("*.toml"))
WORLD_SIZES = {"debug_llama3": 1, "llama3_70b": 64, "llama3_405b": 256}


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_config_is_in_order(path):
    loaded = load_config(["--job.config_file", str(path)])
    assert loaded.problems == []
    assert loaded.warnings == []
    assert find_problems(loaded.config, world_size=WORLD_SIZES.get(path.stem, 8)) == ([], [])
    get_model_spec(loaded.config.model.name).get_args(loaded.config.model.flavor)


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
    "llama3_70b": ["parallelism.tensor_parallel_degree"],
    "llama3_405b": [
        "parallelism.tensor_parallel_degree",
        "parallelism.enable_async_tensor_parallel",
        "model.converters",
    ],
}


@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.stem)
def test_torchtitan_config_loads_unchanged(path):
    loaded = load_config(["--job.config_file", str(path)])
    assert loaded.problems == []
    assert loaded.warnings == []
    problems, warnings = find_problems(loaded.config, world_size=8)
    assert [key for problem in problems for key in problem.keys] == NOT_AVAILABLE[path.stem]
    assert warnings == []
    assert loaded.config.model.name == "llama3"
    assert len([origin for origin in loaded.origins.values() if origin.startswith(str(path))]) > 30
