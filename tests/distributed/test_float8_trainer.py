"""Whole runs in float8: resumed bit for bit, on other ranks, from and to bf16, and with scales that a run before wrote."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.training import Run, assert_equal_states, assert_succeeded

CHECKPOINTS = "--checkpoint.enable"
FLOAT8 = "--quantize.linear.float8"
COMMON = ["--model.flavor=aligned", "--training.mixed_precision_param=bfloat16"]
DELAYED = [
    *COMMON,
    "--model.converters=quantize.linear.float8",
    f"{FLOAT8}.recipe_name=delayed",
    f"{FLOAT8}.delayed_warmup_steps=3",
    f"{FLOAT8}.amax_history_len=2",
    f"{FLOAT8}.emulate",
    f"{FLOAT8}.enable_fsdp_float8_all_gather",
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_delayed_scaling_resumes_bit_for_bit_and_on_other_ranks(run: Run) -> None:
    whole = run.clone("whole")
    expected = assert_succeeded(whole(2, *DELAYED, CHECKPOINTS, keep=(7,)))
    shutil.copytree(whole.checkpoints / "step-2", run.checkpoints / "step-2")  # within the warm-up
    for account, reference in zip(assert_succeeded(run(2, *DELAYED, CHECKPOINTS, keep=(7,))), expected, strict=True):
        assert_equal_states(account, reference, 7)
    assert run.curve() == whole.curve()[2:]
    for name, ranks, options in (("fewer", 1, []), ("tp", 2, ["--parallelism.tensor_parallel_degree=2"])):
        other = run.clone(name)
        shutil.copytree(whole.checkpoints / "step-4", other.checkpoints / "step-4")
        assert_succeeded(other(ranks, *DELAYED, *options, CHECKPOINTS))
        assert other.curve() == pytest.approx(whole.curve()[4:], rel=2e-3)


def test_checkpoints_go_between_float8_and_bf16(run: Run) -> None:
    assert_succeeded(run(1, *DELAYED, CHECKPOINTS, "--training.steps=2"))
    bf16 = run.clone("bf16")
    shutil.copytree(run.checkpoints / "step-2", bf16.checkpoints / "step-2")
    changed = "--checkpoint.allow_config_change=model.converters,quantize.*"
    assert_succeeded(bf16(1, *COMMON, CHECKPOINTS, changed, "--training.steps=4"))
    assert [line["step"] for line in bf16.lines()] == [3, 4]
    shutil.rmtree(run.checkpoints)
    shutil.copytree(bf16.checkpoints / "step-4", run.checkpoints / "step-4")
    (account,) = run(1, *DELAYED, CHECKPOINTS, changed)
    assert "but not float8" in account.error
    assert "exclude_from_loading = ['float8']" in account.error
    assert_succeeded(run(1, *DELAYED, CHECKPOINTS, "--checkpoint.exclude_from_loading=float8"))
    assert run.lines()[-1]["step"] == 7


def test_scales_of_one_run_serve_another(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    # The first of two stages has no float8 layer.
    dynamic = [*COMMON, "--model.converters=float8", f"{FLOAT8}.emulate", f"{FLOAT8}.filter_fqns=layers.0."]
    pipeline = ["--parallelism.pipeline_parallel_degree=2"]
    measured = f"{FLOAT8}.measure_freq=3"
    options = [*dynamic, f"{FLOAT8}.write_scales_file={path}", measured, CHECKPOINTS, *pipeline]
    assert_succeeded(run(2, *options))
    assert [line["step"] for line in run.lines() if "float8/saturated_max" in line] == [3, 6]
    assert all(line["float8/underflowed_max"] > 0 for line in run.lines()[2:6:3])
    scales = json.loads(path.read_text())["scales"]
    assert len(scales) == 7, "those of the other rank"
    assert all(of.keys() == {"input", "weight", "grad_output"} for of in scales.values())
    shutil.rmtree(run.checkpoints / "step-7")
    assert_succeeded(run(2, *options))
    static = run.clone("static")
    assert_succeeded(static(2, *dynamic, f"{FLOAT8}.recipe_name=static", f"{FLOAT8}.static_scales_file={path}"))
    assert static.curve() == pytest.approx(run.curve(), rel=5e-3)
