"""Processes that die, fail, freeze or wait for their data: all end soon, the first cause is named, and the run goes on exactly."""

import re

import pytest

from tests.distributed.training import Run
from tests.faults.actions import crash, die, fail, freeze, stall
from tests.faults.harness import KILL_SECONDS, Fault, run_job
from trainer.components.checkpoint_files import list_steps

OPTIONS = ["--checkpoint.enable", "--debug.seed=3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("deaths"))


@pytest.fixture(scope="module")
def whole(cache: Run) -> Run:
    """The uninterrupted run."""
    run = cache.clone("whole")
    ended = run_job(run, 2, *OPTIONS)
    assert ended.exit_codes == [0, 0], ended.output
    return run


@pytest.fixture
def run(cache: Run, request) -> Run:
    return cache.clone("".join(c if c.isalnum() else "_" for c in request.node.name))


def assert_goes_on_exactly(run: Run, whole: Run, *options: str) -> None:
    ended = run_job(run, 2, *OPTIONS, *options)
    assert ended.exit_codes == [0, 0], ended.output
    assert ended.status["status"] == "complete"
    for key in ("loss", "grad_norm"):
        assert run.curve(key) == whole.curve(key)


@pytest.mark.parametrize(
    ("fault", "options", "kept"),
    [
        pytest.param(Fault("save", die, 4, ranks=(1,)), [], [2], id="one-in-a-save"),
        pytest.param(Fault("saved", die, 4), ["--checkpoint.async_mode=async"], [2], id="in-an-async-save"),
    ],
)
def test_kill_in_a_save_costs_that_save_alone(run: Run, whole: Run, fault: Fault, options: list[str], kept) -> None:
    ended = run_job(run, 2, *OPTIONS, *options, fault=fault)
    assert all(ended.exit_codes), ended.output
    assert ended.seconds < KILL_SECONDS
    assert re.search(
        rf"training broke off in step \d: rank {fault.ranks[0]} \(host .* died, last seen in ", ended.output
    )
    assert list_steps(run.checkpoints) == kept
    assert_goes_on_exactly(run, whole, *options)
    assert not [path.name for path in run.checkpoints.iterdir() if path.name.endswith(".staging")]


def test_kill_while_an_existing_step_is_saved_anew_keeps_the_old_one(run: Run, whole: Run) -> None:
    """The run begins again from step 2 and comes to step 4 a second time."""
    assert run_job(run, 2, *OPTIONS, "--training.steps=4").exit_codes == [0, 0]
    ended = run_job(run, 2, *OPTIONS, "--checkpoint.load_step=2", fault=Fault("saved", die, 4))
    assert all(ended.exit_codes), ended.output
    assert list_steps(run.checkpoints) == [2, 4]
    assert_goes_on_exactly(run, whole)


@pytest.mark.parametrize(("action", "words"), [(fail, "the loss of rank 1 is wet"), (crash, "died, last seen in ")])
def test_first_cause_stands_on_top_and_all_end(run: Run, action, words: str) -> None:
    ended = run_job(run, 2, *OPTIONS, fault=Fault("forward", action, 3, ranks=(1,)))
    assert all(ended.exit_codes), ended.output
    assert ended.seconds < KILL_SECONDS
    assert "Connection closed by peer" not in ended.outputs[0].partition("training broke off")[0]
    assert "training broke off in step 3: rank 1 (host " in ended.output
    assert words in ended.output
    assert (ended.status["status"], ended.status["step"]) == ("failed", 2)
    assert words in ended.status["reason"]


@pytest.mark.parametrize(
    ("fault", "options", "words"),
    [
        # The other rank waits for a gradient of its stage: gloo's receives are seen by where they are waited for alone.
        pytest.param(
            Fault("forward", freeze, 3, ranks=(1,)),
            ["--parallelism.pipeline_parallel_degree=2"],
            "stopped by a signal or a debugger. Rank 0 waits in recv",
            id="frozen-stage",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(Fault("data", stall, 3, ranks=(1,)), [], "waits for its data", id="slow-data"),
    ],
)
def test_rank_that_stands_still_is_named_within_the_timeout(
    run: Run, fault: Fault, options: list[str], words: str
) -> None:
    timeout, kill_seconds = 6, 2.0  # a frozen process heeds SIGKILL alone
    limit = f"--comm.train_timeout_seconds={timeout}"
    ended = run_job(run, 2, *OPTIONS, *options, limit, fault=fault, kill_seconds=kill_seconds)
    assert all(ended.exit_codes), ended.output
    assert "training stands still in step 3 for " in ended.output
    assert words in ended.output
    message = next(line for line in ended.output.splitlines() if "stands still" in line)
    assert "rank 1 (host " in message
    assert "NCCL" not in message
    assert ended.seconds < timeout + kill_seconds + 10
    assert ended.status["status"] == "failed"
