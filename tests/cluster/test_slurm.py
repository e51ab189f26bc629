"""Runs by scripts/slurm/train.sbatch on a real SLURM: a time limit, preemption and a lost node change no loss by a bit.

Three jobs of two nodes each run side by side, with one node to spare. SLURM is installed where root and apt-get can do it.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import PACKAGES, PROGRAMS, SlurmCluster
from tests.distributed.training import Run, assert_succeeded
from tests.packages import install
from trainer.components.checkpoint_files import list_steps

pytestmark = pytest.mark.exhaustive  # Twenty-four programs begin, each of which imports torch.

ROOT = Path(__file__).resolve().parents[2]
STEPS = 48
SETTINGS = (
    "--experimental.custom_import=tests.cluster.paced",
    "--optimizer.name=PacedAdamW",
    f"--training.steps={STEPS}",
    f"--lr_scheduler.total_steps={STEPS}",
    "--checkpoint.enable",
    "--checkpoint.interval=4",
    "--checkpoint.keep_latest_k=3",
)
# Slow enough that no job is done before it is interrupted; after that they do not wait.
ENVIRONMENT = {
    "NNODES": "2",
    "NGPU": "0",
    "PACE_SECONDS": "2",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "SBATCH_TIMELIMIT": "30",
    "SBATCH_SIGNAL": "B:USR1@20",
}
PATIENCE = 480.0


@dataclass
class Job:
    """A job of the cluster and the run that it does."""

    run: Run
    number: str
    cluster: SlurmCluster
    lost: str = ""
    """Its node that was switched off."""

    @property
    def fields(self) -> dict[str, str]:
        """What SLURM knows of it."""
        return self.cluster.get_job(self.number)

    @property
    def nodes(self) -> list[str]:
        return self.cluster.call("scontrol", "show", "hostnames", self.fields["NodeList"]).split()

    @property
    def log(self) -> str:
        files = list(self.cluster.folder.glob(f"bloomery-{self.number}.out"))
        return files[0].read_text() if files else "no output"

    def is_under_way(self) -> bool:
        """Whether there is a checkpoint, and steps since then that a crash would lose."""
        steps = list_steps(self.run.checkpoints)
        return bool(steps) and read_losses(self.run)[-1][0] > steps[-1]

    def was_queued_again(self) -> bool:
        fields = self.fields
        assert fields["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"), self.log
        return fields["JobState"] == "PENDING" and fields["Restarts"] == "1"


def wait_until(what: str, is_so, jobs: list[Job], deadline: float) -> None:
    while not is_so():
        if time.monotonic() > deadline:
            logs = "".join(f"\n=== job {job.number}: {job.fields['JobState']}\n{job.log[-3000:]}" for job in jobs)
            raise AssertionError(f"{what} did not happen{logs}{jobs[0].cluster.describe()}")
        time.sleep(0.3)


def read_losses(run: Run) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step that was trained, as often as it was."""
    lines = map(json.loads, (run.dump_folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "event" not in line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("slurm"))
    assert_succeeded(run(2, *SETTINGS))
    return run


@pytest.fixture(scope="module")
def jobs(reference: Run) -> Iterator[dict[str, Job]]:
    """A job that meets its time limit, one that is preempted and one that loses its first node, when all are done."""
    reason = install(PROGRAMS, PACKAGES)
    if reason:
        pytest.skip(reason)
    deadline = time.monotonic() + PATIENCE
    with SlurmCluster(reference.folder / "cluster", nodes=7) as cluster:

        def submit(name: str) -> Job:
            run = reference.clone(name)
            command = [str(ROOT / "scripts/slurm/train.sbatch"), "--job.config_file", str(run.config_file), *SETTINGS]
            answer = cluster.call(*command, **ENVIRONMENT)
            return Job(run, answer.split()[-1], cluster)

        limited, preempted, bereft = submit("limited"), submit("preempted"), submit("bereft")
        every = [limited, preempted, bereft]

        wait_until("training of the job to lose a node", bereft.is_under_way, every, deadline)
        bereft.lost = bereft.fields["BatchHost"]
        cluster.kill_node(bereft.lost)
        wait_until("training of the job to be preempted", preempted.is_under_way, every, deadline)
        place = f"--nodelist={','.join(preempted.nodes)}"
        cluster.call("sbatch", "--partition=urgent", place, "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
        wait_until("training of the job to meet its limit", limited.is_under_way, every, deadline)
        # SLURM looks at limits twice a minute, and signals whom it would find too late the next time.
        cluster.call("scontrol", "update", f"JobId={limited.number}", "EndTime=now+50")
        waiting = {limited.number: ["TimeLimit=30"], preempted.number: [], bereft.number: []}

        def have_all_been_released() -> bool:
            for job in every:
                if job.number in waiting and job.was_queued_again():
                    cluster.release(job.number, *waiting.pop(job.number))
            return not waiting

        wait_until("queueing again", have_all_been_released, every, deadline)
        wait_until("the end", lambda: not any(is_alive(job) for job in every), every, deadline)
        yield {"limited": limited, "preempted": preempted, "bereft": bereft}


def is_alive(job: Job) -> bool:
    return job.fields["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING")


def assert_done_as_if_nothing_had_been(job: Job, reference: Run) -> None:
    """The job is complete, in two parts with one log, and each loss that it ever saw is that of the other run."""
    assert job.fields["JobState"] == "COMPLETED", job.log
    assert job.fields["Restarts"] == "1"
    assert json.loads((job.run.dump_folder / "status.json").read_text())["status"] == "complete"
    assert "restart 0 of 20" in job.log, "what was written before the restart is kept"
    assert "restart 1 of 20" in job.log
    (resume,) = job.run.lines("resume")
    assert 0 < resume["step"] < STEPS
    expected = {step: values for step, *values in read_losses(reference)}
    losses = read_losses(job.run)
    assert {step for step, *_ in losses} == {*range(1, STEPS + 1)}
    assert [(step, *expected[step]) for step, *_ in losses] == losses


@pytest.mark.timeout(600)
def test_run_goes_on_after_its_time_limit(jobs: dict[str, Job], reference: Run) -> None:
    job = jobs["limited"]
    assert "the time limit is near" in job.log
    assert "SIGUSR1" in job.log
    assert "status preempted" in job.log
    assert_done_as_if_nothing_had_been(job, reference)
    assert len(read_losses(job.run)) == STEPS, "it saved when it was told, so nothing is done twice"


@pytest.mark.timeout(600)
def test_run_goes_on_after_preemption(jobs: dict[str, Job], reference: Run) -> None:
    job = jobs["preempted"]
    assert "SIGTERM" in job.log
    assert "status preempted" in job.log
    assert_done_as_if_nothing_had_been(job, reference)
    assert len(read_losses(job.run)) == STEPS, "it saved when it was told, so nothing is done twice"


@pytest.mark.timeout(600)
def test_run_goes_on_after_the_loss_of_its_first_node(jobs: dict[str, Job], reference: Run) -> None:
    job = jobs["bereft"]
    assert_done_as_if_nothing_had_been(job, reference)
    assert len(read_losses(job.run)) > STEPS, "steps since the checkpoint before are trained again"
    assert job.lost not in job.nodes, "on others"
