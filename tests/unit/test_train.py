"""train.py: what `main` answers, and that a run can be started again from what it wrote down."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.training import SECRETS, USER_MODULE, Run
from trainer import train
from trainer.config.errors import UserError
from trainer.config.manager import load_config
from trainer.config.schema import JobConfig
from trainer.distributed.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
DEBUG_CONFIG = str(ROOT / "train_configs" / "debug_llama3.toml")


@pytest.fixture
def answer(monkeypatch, tmp_path, capsys):
    """Calls `main`, where it must not come to a run. Returns exit code, stdout and stderr."""
    monkeypatch.setattr(train, "setup_logging", lambda **_: None)

    def call(*argv: str, rank: int = 0, world_size: int = 1, **variables: str):
        monkeypatch.setattr(train, "_run", lambda *_, **__: pytest.fail("a run was started"))
        folder = ["--job.dump_folder", str(tmp_path / "run")]
        code = train.main([*folder, *argv], {"RANK": str(rank), "WORLD_SIZE": str(world_size), **variables})
        assert not (tmp_path / "run").exists(), "nothing is written before a run"
        return code, *capsys.readouterr()

    return call


def test_validate_only_prints_the_settings_with_their_origins(answer):
    code, stdout, stderr = answer(
        "--job.config_file", DEBUG_CONFIG, "--training.steps=7", "--job.validate_only", world_size=2
    )
    assert (code, stderr) == (0, "")
    assert "steps = 7  # command line" in stdout
    assert f"lr = 0.002  # {DEBUG_CONFIG}:" in stdout
    assert "beta1 = 0.9\n" in stdout


def test_validate_only_does_not_import_the_users_module(answer, monkeypatch, tmp_path):
    (tmp_path / "explosive.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert answer("--experimental.custom_import=explosive", "--job.validate_only")[0] == 0


def test_all_problems_are_told_at_once_by_the_first_rank_alone(answer):
    argv = ("--optimizer.lr=-1", "--model.flavor=tiny", "--trainig.steps=3", "--training.dataset=stdlibb")
    code, stdout, stderr = answer(*argv, world_size=2)
    assert (code, stdout) == (2, "")
    for words in ("4 problems", "optimizer.lr", "model.flavor", "trainig.steps", "id you mean", "stdlibb"):
        assert words in stderr
    assert "Traceback" not in stderr
    assert answer(*argv, rank=1, world_size=2) == (2, "", "")


def test_problems_are_told_by_one_process_of_each_host(answer):
    """Hosts may have files of their own."""
    told = {}
    for rank in range(4):
        told[rank] = answer("--training.dataset=text", rank=rank, world_size=4, LOCAL_RANK=str(rank % 2))[2]
    assert [bool(text) for text in told.values()] == [True, False, True, False]


def test_number_of_processes_counts(answer):
    argv = ("--training.local_batch_size=2", "--training.global_batch_size=6", "--job.validate_only")
    assert answer(*argv, world_size=3)[0] == 0
    code, _, stderr = answer(*argv, world_size=2)
    assert code == 2
    assert "training.global_batch_size" in stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["filter_fqns=lm_head"], "'lm_head' is part of no module's name"),
        (
            ["enable_fsdp_float8_all_gather=true", "emulate=true"],
            "rows of layers.0.attention.wq.weight into 3",
        ),
        ([], "A100 has 8.0. Set quantize.linear.float8.emulate = true"),
    ],
)
def test_conversion_that_fails_is_told_before_anything_is_prepared(answer, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not options)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    argv = ["--job.config_file", DEBUG_CONFIG, "--model.converters=float8"]
    code, _, stderr = answer(*argv, *(f"--quantize.linear.float8.{option}" for option in options), world_size=3)
    assert code == 2
    assert words in stderr
    assert "command line" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.name=bloomlett"], r"[Dd]id you mean '?bloomlet\b"),
        (["--model.flavor=tiniest"], r"[Dd]id you mean '?tiny\b"),
        (
            ["--model.flavor=too_small"],
            "the tokenizer has 259 tokens, but model.flavor = too_small has vocab_size = 100",
        ),
        (["--training.dataset=nots"], r"[Dd]id you mean '?notes\b"),
        (["--optimizer.name=momentun"], r"[Dd]id you mean '?Momentum\b"),
    ],
)
def test_names_that_the_users_module_does_not_register_are_told(tmp_path, argv, words):
    run = Run(tmp_path)
    (account,) = run(1, *argv)
    assert (account.exit_code, account.error) == (2, "")
    assert "1 problem" in account.stderr
    assert re.search(words, account.stderr)
    assert "command line" in account.stderr
    assert not run.dump_folder.exists()


@pytest.mark.parametrize("is_first", [True, False])
def test_mistake_found_after_the_start_is_told_once_without_a_traceback(tmp_path, monkeypatch, caplog, is_first):
    def fail(*_: object):
        raise UserError("data.text_key = body: no such field")

    monkeypatch.setattr("trainer.trainer.Trainer", fail)
    monkeypatch.setattr(Watchdog, "is_first_to_tell", lambda *_: is_first)
    monkeypatch.setattr(train, "setup_logging", lambda **_: None)
    argv = ["--job.config_file", DEBUG_CONFIG, "--job.dump_folder", str(tmp_path)]
    assert train.main(argv, {}) == 1
    errors = [(record.getMessage(), record.exc_info) for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [("data.text_key = body: no such field", None)] * is_first
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", "UserError: data.text_key = body: no such field")


def test_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_: object):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr("trainer.trainer.Trainer", fail)
    monkeypatch.setattr(train, "setup_logging", lambda **_: None)
    with pytest.raises(ValueError, match="unpack") as caught:
        train.main(["--job.config_file", DEBUG_CONFIG, "--job.dump_folder", str(tmp_path)], {})
    assert any(entry.name == "fail" for entry in caught.traceback)


def test_folder_that_cannot_be_written_is_told(monkeypatch, caplog):
    monkeypatch.setattr(train, "setup_logging", lambda **_: None)
    assert train.main(["--job.config_file", DEBUG_CONFIG, "--job.dump_folder=/proc/run"], {}) == 1
    assert "job.dump_folder = /proc/run: cannot be written ([Errno" in caplog.text


def test_rows_and_folders_of_a_run_that_cannot_be_used_are_told(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"body": "iron"}\n')
    rows = ["--training.dataset=jsonl", f"--training.dataset_path={tmp_path / 'rows.jsonl'}", "--data.max_bad_rows=0"]
    run.dump_folder.mkdir()
    run.checkpoints.touch()
    for argv, words in (
        (rows, r"data.max_bad_rows = 0; the last one: .*rows.jsonl, line 1: no field 'text', it has body"),
        (["--checkpoint.enable"], "checkpoint.folder = checkpoint: .*run/checkpoint cannot be written .*Name another"),
    ):
        (account,) = run(1, *argv)
        assert account.exit_code == 1
        assert re.search(rf"ERROR +.*{words}", account.stdout)
        assert "Traceback" not in account.stdout + account.stderr


def test_run_can_be_started_again_from_what_it_wrote_down(tmp_path):
    run = Run(tmp_path)
    overrides = ["--training.steps=3", "--optimizer.param_groups", '[{match = "*norm*", lr_scale = 0.5}]']
    argv = ["--job.config_file", str(run.config_file), *overrides, "--job.save_config_file=kept/config.toml"]
    (first,) = run(1, *argv[2:], keep=(3,))
    assert first.exit_code == 0, first.stdout + first.stderr
    written = run.dump_folder / "config.toml"
    again = load_config(["--job.config_file", str(written)])
    assert not again.problems
    assert without_config_file(again.config) == without_config_file(load_config(argv).config)
    assert "steps = 3  # command line" in written.read_text()
    assert (run.dump_folder / "kept" / "config.toml").read_text() == written.read_text()
    losses = run.curve()
    run.config_file = written
    (second,) = run(1, f"--job.dump_folder={tmp_path / 'second'}", keep=(3,))
    assert second.exit_code == 0, second.stdout + second.stderr
    run.dump_folder = tmp_path / "second"
    assert run.curve() == losses
    assert all(value.equal(first.states[3][name]) for name, value in second.states[3].items())


def test_secrets_of_the_environment_are_written_nowhere(tmp_path):
    run = Run(tmp_path)
    everything = [
        "--checkpoint.enable",
        "--metrics.enable_tensorboard",
        "--job.print_config",
        "--job.save_config_file=x",
    ]
    everything += ["--profiling.enable_profiling", "--profiling.profile_freq=2", "--profiling.profiler_warmup=0"]
    (good,) = run(1, *everything, "--training.steps=2")
    (bad,) = run(1, *everything, "--training.steps=4", "--training.max_norm=0.5")
    assert (good.exit_code, "allow_config_change" in bad.error) == (0, True)
    written = [path for path in run.dump_folder.rglob("*") if path.is_file()]
    assert {"config.toml", "checkpoint.json", "metrics.jsonl"} <= {path.name for path in written}
    told = [path.read_bytes() for path in written]
    told += [text.encode() for account in (good, bad) for text in (account.stdout, account.stderr, account.error)]
    assert not any(secret.encode() in text for text in told for secret in SECRETS.values())


def without_config_file(config: JobConfig) -> JobConfig:
    import dataclasses

    return dataclasses.replace(config, job=dataclasses.replace(config.job, config_file=None))


@pytest.mark.parametrize(
    ("limit", "answer", "seconds"),
    [("1:00:00", "", 3600), (None, "echo 1-02:03:04", 93784), (None, "echo UNLIMITED", None), (None, "exit 1", None)],
)
def test_time_that_is_left_is_what_is_set_else_what_slurm_says(tmp_path, monkeypatch, caplog, limit, answer, seconds):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n[ \"$*\" = '-h -j 7 -o %L' ] && {answer or 'exit 3'}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(train.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(train.time, "time", lambda: 5000.0)
    assert train._find_end(limit, {"SLURM_JOB_ID": "7"}) == (None if seconds is None else 100.0 + seconds)
    assert ("set job.time_limit" in caplog.text) == (answer == "exit 1")
    assert train._find_end(None, {}) is None
    assert train._find_end("1:00:00", {"BLOOMERY_START_TIME": "4000"}) == 100.0 + 3600 - 1000


def test_program_answers_without_torch_and_without_a_traceback(tmp_path):
    """As a process of its own, from another folder, with a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def start(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "trainer.train", *argv]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    bad = start("--job.config_file", "missing.toml", "--training.seq_len=0")
    assert bad.returncode == 2
    assert "missing.toml" in bad.stderr
    assert "training.seq_len" in bad.stderr
    assert "Traceback" not in bad.stderr
    good = start(
        "--job.config_file", DEBUG_CONFIG, "--job.validate_only", f"--experimental.custom_import={USER_MODULE}"
    )
    assert good.returncode == 0, good.stderr
    assert "steps = 120" in good.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["torch.py"]
