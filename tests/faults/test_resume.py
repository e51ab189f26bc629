"""Runs that go on elsewhere, on other data, or without a network."""

import pytest

from tests.distributed.training import Run, assert_succeeded, sequences_by_step
from tests.faults.harness import run_job

OPTIONS = ["--checkpoint.enable", "--debug.seed=3", "--checkpoint.interval=3"]
TENSOR = "--parallelism.tensor_parallel_degree=2"
PIPELINE = "--parallelism.pipeline_parallel_degree=2"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def run(cache: Run, request) -> Run:
    return cache.clone("".join(c if c.isalnum() else "_" for c in request.node.name))


def test_resume_on_other_meshes_keeps_token_order_and_loss(run: Run) -> None:
    """FSDP, then tensor parallelism, then a pipeline, in one chain."""
    whole = run.clone("whole")
    expected = sequences_by_step(assert_succeeded(whole(2, *OPTIONS)))
    assert_succeeded(run(2, *OPTIONS, "--training.steps=2", "--lr_scheduler.total_steps=7"))
    for options in ([TENSOR, "--training.steps=4"], [PIPELINE, "--training.steps=7"]):
        accounts = assert_succeeded(run(2, *OPTIONS, *options, "--lr_scheduler.total_steps=7"))
        for step, rows in accounts[0].sequences.items():
            assert sorted(rows) == expected[step]
    assert run.curve() == pytest.approx(whole.curve(), rel=1e-4)


def test_data_that_changed_under_the_same_name_are_refused(run: Run, tmp_path) -> None:
    text = tmp_path / "a.txt"
    data = ["--training.dataset=text", f"--training.dataset_path={text}", "--data.packing=concat"]
    text.write_text("iron and slag " * 400)
    assert_succeeded(run(1, *OPTIONS, *data, "--training.steps=3", "--training.global_batch_size=2"))
    text.write_text("gold and dust " * 400)
    (account,) = run(1, *OPTIONS, *data, "--training.steps=5", "--training.global_batch_size=2")
    assert "made with another order of data" in account.error
    assert "the data themselves" in account.error


def test_whole_run_needs_no_network(run: Run) -> None:
    offline = "--experimental.custom_import=tests.faults.offline_module"
    ended = run_job(run, 2, *OPTIONS, "--validation.enable", offline)
    assert ended.exit_codes == [0, 0], ended.output
    assert ended.status["status"] == "complete"
