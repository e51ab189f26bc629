"""scripts/slurm/train.sbatch with made-up commands of SLURM, which write down what they were given."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.test_entry import ROOT, Tree

TOOLS = ("date", "mkdir", "head", "tail", "find", "sort", "sleep", "rm", "cat")
TRAIN = """
import os, sys
if "--training.stesp" in sys.argv:
    print("error: bad key", file=sys.stderr)
    sys.exit(2)
enable = os.environ.get("CHECKPOINTS", "true")
print(f'[job]\\ndump_folder = "run"\\n[checkpoint]\\nenable = {enable}\\nfolder = "checkpoint"')
"""
RECORD = """
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps({"who": "NAME", "argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
"""
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[3-4]",
    "BLOOMERY_INSTALL": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


class SlurmTree(Tree):
    """A made-up repository with the script, and a PATH with made-up commands of SLURM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in TOOLS:
            if not (self.bin / name).exists():
                (self.bin / name).symlink_to(shutil.which(name))
        self.write("trainer/train.py", TRAIN)
        self.record = folder / "record.jsonl"
        self.script = self.repo / "scripts/slurm/train.sbatch"
        self.script.parent.mkdir()
        shutil.copy(ROOT / "scripts/slurm/train.sbatch", self.script)
        self.copy = folder / "spool" / "slurm_script"  # what SLURM runs
        self.copy.parent.mkdir()
        shutil.copy(self.script, self.copy)
        for name, body in {
            "sbatch": "echo Submitted batch job 77",
            "srun": 'mkdir -p run; [[ -z "${ENDS:-}" ]] || echo "{\\"status\\": \\"$ENDS\\"}" >run/status.json; exit "${CODE:-0}"',
            "scontrol": 'case "$2" in hostnames) echo gpu3; echo gpu4;; node) echo "NodeName=$3 NodeAddr=10.1.0.3 Port=1";; esac',
            "squeue": 'echo "${STATE:-RUNNING}"',
            "scancel": ":",
        }.items():
            self.write(f"record_{name}.py", RECORD.replace("NAME", name))
            self.add_tool(name, f'python "{self.repo}/record_{name}.py" "$@"\n{body}')

    def start(self, script: Path, *args: str, **env: str) -> subprocess.Popen:
        self.record.unlink(missing_ok=True)
        base = {"PATH": str(self.bin), "HOME": str(self.bin), "RECORD": str(self.record)}
        return subprocess.Popen(
            [str(script), *args],
            cwd=self.repo,
            env={**base, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *args: str, **env: str) -> tuple[int, str]:
        """Exit code and output of the script, called by a user."""
        process = self.start(self.script, *args, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def run_job(self, *args: str, **env: str) -> tuple[int, str]:
        """Exit code and output of the script as SLURM runs it."""
        process = self.start(self.copy, *args, **{**JOB, "SLURM_SUBMIT_DIR": str(self.repo), **env})
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def get_calls(self, who: str) -> list[dict]:
        """What a command was given since the last start."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for call in map(json.loads, lines) if call["who"] == who]

    def get_requeues(self) -> int:
        return sum(call["argv"] == ["requeue", "77"] for call in self.get_calls("scontrol"))


@pytest.fixture
def tree(tmp_path: Path) -> SlurmTree:
    return SlurmTree(tmp_path)


# --- on the login node ---


def test_submits_itself_for_whole_nodes(tree: SlurmTree) -> None:
    code, output = tree.submit("--training.steps", "5 000", NNODES="4", NGPU="8", CONFIG_FILE="my.toml")
    assert (code, output) == (0, "Submitted batch job 77\n")
    (call,) = tree.get_calls("sbatch")
    options = ["--nodes=4", "--export=ALL", "--gpus-per-node=8", "--exclusive", "--mem=0"]
    assert call["argv"] == [*options, str(tree.script), "--training.steps", "5 000"]
    passed_on = {name: call["env"][name] for name in ("CONFIG_FILE", "NGPU", "BLOOMERY_HOME", "BLOOMERY_INSTALL")}
    assert passed_on == {
        "CONFIG_FILE": "my.toml",
        "NGPU": "8",
        "BLOOMERY_HOME": str(tree.repo),
        "BLOOMERY_INSTALL": "0",
    }


def test_dry_run_prints_and_submits_nothing(tree: SlurmTree) -> None:
    code, output = tree.submit("--dry-run", "--training.steps", "5", NGPU="0", CPUS="16", SBATCH_PARTITION="long")
    assert code == 0
    assert f"sbatch --nodes=1 --export=ALL --cpus-per-task=16 {str(tree.script).replace(' ', chr(92) + ' ')}" in output
    assert "--training.steps 5" in output
    assert "--requeue --signal=B:USR1@180" in output
    assert "--open-mode=append" in output
    assert "SBATCH_PARTITION=long" in output
    assert tree.get_calls("sbatch") == []


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["--training.stesp", "5"], {}, "error: bad key"),
        ([], {"NNODES": "0"}, "NNODES=0: must be"),
        ([], {"NGPU": "all"}, "NGPU=all: must be"),
        ([], {"CPUS": "0"}, "CPUS=0: must be"),
    ],
)
def test_mistake_is_answered_before_the_queue(
    tree: SlurmTree, args: list[str], env: dict[str, str], words: str
) -> None:
    code, output = tree.submit(*args, **env)
    assert code == 2
    assert words in output
    assert tree.get_calls("sbatch") == []


def test_explains_itself(tree: SlurmTree) -> None:
    code, output = tree.submit("--help")
    assert code == 0
    assert output.startswith("Train on a SLURM cluster")
    assert "MAX_REQUEUES" in output


# --- in the job ---


def test_job_runs_on_all_nodes_and_is_done_once_complete(tree: SlurmTree) -> None:
    code, output = tree.run_job("--training.steps", "5", ENDS="complete", SLURM_CPUS_PER_TASK="12", RDZV_ENDPOINT="x:1")
    assert code == 0, output
    (call,) = tree.get_calls("srun")
    argv, env = call["argv"], call["env"]
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--gpu-bind=none", "--export=ALL"} <= {*argv}
    assert argv[-3:] == [str(tree.repo / "run_train.sh"), "--training.steps", "5"]
    assert (env["NNODES"], env["MASTER_ADDR"], env["SRUN_CPUS_PER_TASK"]) == ("2", "10.1.0.3", "12")
    assert 20_000 <= int(env["MASTER_PORT"]) < 30_000
    assert "RDZV_ENDPOINT" not in env
    assert env["BLOOMERY_INSTALL"] == "0"
    assert "SIGTERM" not in env["PET_SIGNALS_TO_HANDLE"]
    assert tree.get_requeues() == 0


def test_each_start_meets_at_a_place_of_its_own(tree: SlurmTree) -> None:
    places = []
    for restart in ("0", "1"):
        tree.run_job(ENDS="complete", SLURM_RESTART_COUNT=restart)
        env = tree.get_calls("srun")[0]["env"]
        places.append((env["MASTER_PORT"], env["RDZV_ID"]))
        assert env["RDZV_ID"].startswith(f"77.{restart}.")
    assert places[0] != places[1]


@pytest.mark.parametrize("code", ["0", "143"])
def test_preempted_job_goes_back_into_the_queue(tree: SlurmTree, code: str) -> None:
    assert tree.run_job(ENDS="preempted", CODE=code, SLURM_RESTART_COUNT="19")[0] == 0
    assert tree.get_requeues() == 1


def test_restarts_are_capped(tree: SlurmTree) -> None:
    code, output = tree.run_job(ENDS="preempted", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert code == 1
    assert "MAX_REQUEUES=3 is reached" in output
    assert tree.get_requeues() == 0
    # SLURM queues a job again by itself too.
    code, output = tree.run_job(ENDS="complete", SLURM_RESTART_COUNT="4", MAX_REQUEUES="3")
    assert code == 2
    assert tree.get_calls("srun") == []


def test_failure_is_tried_again_while_there_are_new_checkpoints(tree: SlurmTree) -> None:
    (tree.repo / "run/checkpoint/step-5").mkdir(parents=True)
    assert tree.run_job(CODE="1")[0] == 0
    assert tree.get_requeues() == 1
    (tree.repo / "run/checkpoint/step-10").mkdir()
    assert tree.run_job(CODE="1", ENDS="failed")[0] == 0
    assert tree.get_requeues() == 1
    code, output = tree.run_job(CODE="7", ENDS="failed")
    assert code == 7
    assert "failed twice without a checkpoint in between" in output
    assert tree.get_requeues() == 0


def test_status_of_the_time_before_does_not_count(tree: SlurmTree) -> None:
    (tree.repo / "run").mkdir()
    (tree.repo / "run/status.json").write_text('{"status": "complete"}')
    assert tree.run_job(CODE="1")[0] == 0
    assert tree.get_requeues() == 1


@pytest.mark.parametrize("ends", ["preempted", "failed"])
def test_job_that_slurm_ends_is_left_to_slurm(tree: SlurmTree, ends: str) -> None:
    assert tree.run_job(ENDS=ends, STATE="COMPLETING")[0] == 1
    assert tree.get_requeues() == 0


def test_job_without_checkpoints_is_not_begun_anew(tree: SlurmTree) -> None:
    code, output = tree.run_job(ENDS="preempted", CHECKPOINTS="false")
    assert code == 1
    assert "checkpoint.enable" in output
    assert tree.get_requeues() == 0


def test_signal_is_passed_on_and_waited_for(tree: SlurmTree) -> None:
    tree.add_tool("srun", 'mkdir -p run\n: >run/started\nsleep 1\necho \'{"status": "preempted"}\' >run/status.json')
    job = tree.start(tree.copy, **JOB, SLURM_SUBMIT_DIR=str(tree.repo))
    end = time.monotonic() + 30
    while not (tree.repo / "run/started").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGUSR1)
    time.sleep(0.2)
    os.kill(job.pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0, output
    assert tree.get_calls("scancel")[0]["argv"] == ["--signal=USR1", "77.0"]
    assert "status preempted" in output
    assert tree.get_requeues() == 1


def test_place_of_the_code_is_asked_for_where_it_is_not_known(tree: SlurmTree, tmp_path: Path) -> None:
    code, output = tree.run_job(SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2
    assert "set BLOOMERY_HOME" in output
