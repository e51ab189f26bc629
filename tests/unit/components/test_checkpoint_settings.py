"""The settings of a run are kept in its checkpoints, and compared at a resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.components.checkpoint_run import SECTION, Run
from trainer.components import checkpoint_files as files
from trainer.config.changes import describe_settings
from trainer.config.fields import build_config
from trainer.config.schema import CheckpointConfig

FIRST = {"optimizer.lr": 0.01, "training.steps": 20}


def build(folder: Path, section: CheckpointConfig = SECTION, **values) -> Run:
    config = build_config({**FIRST, **values})
    return Run(folder, section, settings=describe_settings(config, None, global_batch_size=8))


def test_settings_are_in_the_manifest(tmp_path):
    build(tmp_path).step(2)
    manifest = json.loads((tmp_path / "step-2" / files.MANIFEST_NAME).read_text())
    assert manifest["config"]["optimizer.lr"] == 0.01
    assert manifest["config"]["training.global_batch_size"] == 8


def test_change_that_does_no_harm_is_shown(tmp_path, caplog):
    caplog.set_level("INFO")
    build(tmp_path).step(2)
    assert build(tmp_path, **{"compile.enable": True, "training.steps": 40}).manager.load() == 2
    assert "compile.enable: false -> true (the same up to rounding)" in caplog.text
    assert "training.steps: 20 -> 40 (harmless)" in caplog.text
    assert "the schedule is laid out anew, over 40 steps and not 20" in caplog.text


def test_change_of_the_result_needs_to_be_said(tmp_path):
    build(tmp_path).step(2)
    change = {"optimizer.lr": 0.5}
    words = r"(?s)step-2 was saved with other settings.*optimizer\.lr: 0\.01 -> 0\.5.*--checkpoint\.allow_config_change optimizer\.lr"
    for section in (SECTION, replace(SECTION, load_step=2)):
        with pytest.raises(ValueError, match=words):
            build(tmp_path, section, **change).manager.load()
    assert build(tmp_path, replace(SECTION, allow_config_change=["optimizer.*"]), **change).manager.load() == 2


def test_weights_alone_and_runs_without_settings_are_not_compared(tmp_path):
    build(tmp_path / "a").step(2)
    assert Run(tmp_path / "a").manager.load() == 2
    section = replace(SECTION, initial_load_path=str(tmp_path / "a" / "step-2"))
    assert build(tmp_path / "b", section, **{"optimizer.lr": 0.5}).manager.load() == 0
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        build(tmp_path / "c", replace(section, initial_load_model_only=False), **{"optimizer.lr": 0.5}).manager.load()
