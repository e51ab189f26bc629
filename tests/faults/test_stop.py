"""Runs that are told to stop: all ranks after the same step, one save, a status, exit code 0; then exactly what would have been."""

import pytest

from tests.distributed.training import Run
from tests.faults.actions import (
    be_told_to_stop_while_another_waits,
    send_both,
    send_term,
    send_term_twice,
    send_usr1,
    wait_for_data_while_another_is_told_to_stop,
)
from tests.faults.harness import Fault, run_job
from trainer.components.checkpoint_files import list_steps

OPTIONS = ["--checkpoint.enable", "--debug.seed=3"]
SECONDS = 20.0  # below the 30 s that SLURM and torchrun give


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("stop"))


@pytest.fixture(scope="module")
def whole(cache: Run) -> Run:
    """The uninterrupted run."""
    run = cache.clone("whole")
    ended = run_job(run, 2, *OPTIONS)
    assert ended.exit_codes == [0, 0], ended.output
    assert (ended.status["status"], ended.status["step"]) == ("complete", 7)
    return run


@pytest.fixture
def run(cache: Run, request) -> Run:
    return cache.clone("".join(c if c.isalnum() else "_" for c in request.node.name))


@pytest.mark.parametrize(
    ("fault", "options", "reason", "step"),
    [
        pytest.param(Fault("forward", send_term, 3, ranks=(1,)), [], "SIGTERM", 4, id="term-one-rank"),
        pytest.param(
            Fault("forward", send_term, 3, ranks=(1,)),
            ["--parallelism.tensor_parallel_degree=2"],
            "SIGTERM",
            4,
            id="term-one-tensor-parallel-rank",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Fault("forward", send_usr1, 3, ranks=(0, 1)),
            [],
            "SIGUSR1",
            4,
            id="usr1-all-ranks",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(Fault("forward", send_both, 3, ranks=(0, 1)), [], "SIGUSR1", 4, id="usr1-then-term-twice"),
        pytest.param(Fault("save", send_term_twice, 2, ranks=(1,)), [], "SIGTERM", 2, id="in-a-save"),
        pytest.param(
            Fault("validation", send_term, 2, ranks=(1,)),
            ["--validation.enable", "--checkpoint.interval=50"],
            "SIGTERM",
            2,
            id="in-a-validation",
        ),
        pytest.param(
            Fault("compile", send_term, ranks=(1,)),
            ["--compile.enable", "--compile.backend=fault_in_compiler", "--compile.components", '["model"]'],
            "SIGTERM",
            1,
            id="in-compilation",
        ),
        pytest.param(Fault("start", send_term, ranks=(1,)), [], "SIGTERM", 0, id="before-the-first-step"),
    ],
)
def test_signal_stops_all_ranks_at_one_step_with_one_save(run, whole, fault, options, reason, step) -> None:
    ended = run_job(run, 2, *OPTIONS, *options, fault=fault)
    assert ended.exit_codes == [0, 0], ended.output
    assert ended.seconds < SECONDS
    assert {key: ended.status[key] for key in ("status", "step", "reason")} == {
        "status": "preempted", "step": step, "reason": reason,
    }  # fmt: skip
    saves = [line["step"] for line in run.lines("checkpoint")]
    assert saves == sorted(set(saves)), "no step is saved twice"
    assert list_steps(run.checkpoints)[-1:] == ([step] if step else [])
    if options or fault.place != "forward" or reason == "SIGUSR1":
        return
    assert run_job(run, 2, *OPTIONS).status["status"] == "complete"
    assert run.curve() == whole.curve()
    assert run.curve("grad_norm") == whole.curve("grad_norm")


@pytest.mark.parametrize(
    ("action", "name"),
    [(wait_for_data_while_another_is_told_to_stop, "SIGUSR1"), (be_told_to_stop_while_another_waits, "SIGTERM")],
)
def test_signal_to_one_rank_before_training_ends_all(run, action, name) -> None:
    ended = run_job(run, 2, *OPTIONS, "--comm.heartbeat_seconds=1", fault=Fault("prepare", action, ranks=(0, 1)))
    assert ended.exit_codes == [0, 0], ended.output
    assert ended.seconds < SECONDS
    assert "Traceback" not in ended.output
    assert {key: ended.status[key] for key in ("status", "step", "reason")} == {
        "status": "preempted", "step": 0, "reason": f"{name} before training began",
    }  # fmt: skip


def test_time_limit_stops_and_saves_before_it_is_over(run) -> None:
    limit = 8
    endless = ["--training.steps=100000", "--checkpoint.interval=50000", f"--job.time_limit=0:00:0{limit}"]
    ended = run_job(run, 2, *OPTIONS, *endless)
    assert ended.exit_codes == [0, 0], ended.output
    assert (ended.status["status"], ended.status["reason"]) == ("preempted", "time limit")
    assert list_steps(run.checkpoints) == [ended.status["step"]]
    times = [line["time"] for line in run.lines("start") + run.lines("end")]
    assert times[1] - times[0] < limit
