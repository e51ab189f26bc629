"""run_train.sh and scripts/setup_env.sh, run as a user runs them.

Most tests run a copy of the scripts over a made-up tree, whose `trainer` and `torch.distributed.run` only tell what they
were given, on a PATH that holds nothing but what the test put there.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from scripts import check_environment

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "env", "dirname", "sed", "tr", "grep", "timeout", "mkdir", "touch", "rm", "cat")
TELL = """
import json, os, sys
with open(os.environ["PYTHONPATH"].split(":")[0] + "/calls.jsonl", "a") as file:
    file.write(json.dumps({"who": "NAME", "argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
if "--bad" in sys.argv:
    print("error: bad key", file=sys.stderr)
    sys.exit(2)
"""


class Tree:
    """A made-up repository, and a PATH of its own."""

    def __init__(self, folder: Path):
        self.repo, self.bin = folder / "a repo", folder / "bin"
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        files = {
            "pyproject.toml": '[project]\nname = "x"\ndependencies = []\n[project.optional-dependencies]\ndev = []\n',
            "trainer/__init__.py": "",
            "trainer/train.py": TELL.replace("NAME", "train"),
            "torch/__init__.py": "",
            "torch/distributed/__init__.py": "",
            "torch/distributed/run.py": TELL.replace("NAME", "torchrun"),
            "train_configs/debug_llama3.toml": "",
        }
        for name, text in files.items():
            self.write(name, text)
        for name in ("run_train.sh", "scripts/setup_env.sh", "scripts/check_environment.py"):
            (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.repo / name)
        self.add_tool("python", f'exec "{sys.executable}" "$@"')

    def write(self, name: str, text: str) -> None:
        (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
        (self.repo / name).write_text(text)

    def add_tool(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.repo / "run_train.sh"), *args],
            cwd=cwd or self.repo,
            env={"PATH": str(self.bin), "HOME": str(self.bin), **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[dict]:
        """What the programs were given since the last time, in order."""
        record = self.repo / "calls.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def launch(self, *args: str, cwd: Path | None = None, **env: str) -> tuple[dict, dict]:
        """What the check of the settings, and then torchrun, were given."""
        done = self.run(*args, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        check, torchrun = self.calls()
        assert (check["who"], check["argv"][-1], torchrun["who"]) == ("train", "--job.validate_only", "torchrun")
        return check, torchrun


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def get_option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_default_checks_settings_then_launches_one_process(tree):
    check, torchrun = tree.launch("--training.steps", "5")
    overrides = ["--training.steps", "5", "--job.config_file", "train_configs/debug_llama3.toml"]
    assert check["argv"][:-1] == overrides
    assert check["env"]["WORLD_SIZE"] == "1"
    argv = torchrun["argv"]
    assert argv[argv.index("-m") :] == ["-m", "trainer.train", *overrides]
    assert get_option(argv, "--nproc_per_node") == "1"
    assert get_option(argv, "--rdzv_endpoint") == "localhost:0"
    assert "WORLD_SIZE" not in torchrun["env"]
    assert "PYTORCH_ALLOC_CONF" not in torchrun["env"]
    assert torchrun["env"]["LOG_RANK"] == "0"


def test_runs_from_any_folder_and_paths_stay_the_users(tree, tmp_path):
    elsewhere = tmp_path / "else where"
    (elsewhere / "trainer").mkdir(parents=True)  # must not hide ours
    (elsewhere / "trainer" / "__init__.py").write_text("")
    (elsewhere / "mine.toml").write_text("")
    default = tree.launch("--data.text", "my file.txt", cwd=elsewhere)[1]
    assert get_option(default["argv"], "--job.config_file") == str(tree.repo / "train_configs" / "debug_llama3.toml")
    assert get_option(default["argv"], "--data.text") == "my file.txt"
    assert default["env"]["PYTHONPATH"].split(":") == [str(tree.repo), str(elsewhere)]
    own = tree.launch(cwd=elsewhere, CONFIG_FILE="mine.toml")[1]
    assert get_option(own["argv"], "--job.config_file") == "mine.toml"


def test_config_file_among_the_arguments_counts_alone(tree):
    check, torchrun = tree.launch("--job.config_file=other.toml")
    assert check["argv"][:-1] == ["--job.config_file=other.toml"]
    assert torchrun["argv"][-2:] == ["trainer.train", "--job.config_file=other.toml"]


@pytest.mark.parametrize("flag", ["--help", "-h", "--job.validate_only", "--job.validate_only=true"])
def test_questions_are_answered_without_torchrun(tree, flag):
    done = tree.run("--training.steps", "5", flag, NGPU="4", NNODES="2", MASTER_ADDR="a", NODE_RANK="0")
    assert done.returncode == 0
    (call,) = tree.calls()
    assert call["argv"] == ["--training.steps", "5", flag, "--job.config_file", "train_configs/debug_llama3.toml"]
    assert (call["who"], call["env"]["WORLD_SIZE"]) == ("train", "8")


@pytest.mark.parametrize(
    ("args", "env"),
    [(["--max-restarts", "3"], {}), (["--max-restarts=3"], {"MAX_RESTARTS": "1"}), ([], {"MAX_RESTARTS": "3"})],
)
def test_restarts_in_place_get_a_store_of_their_own(tree, args, env):
    check, torchrun = tree.launch("--training.steps", "5", *args, **env)
    assert (
        check["argv"][:2]
        == torchrun["argv"][torchrun["argv"].index("trainer.train") + 1 :][:2]
        == ["--training.steps", "5"]
    )
    assert "--max-restarts" not in " ".join(check["argv"])
    assert get_option(torchrun["argv"], "--max_restarts") == "3"
    assert torchrun["env"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_bad_settings_end_before_torchrun(tree):
    done = tree.run("--bad")
    assert done.returncode == 2
    assert "error: bad key" in done.stderr
    assert [call["who"] for call in tree.calls()] == ["train"]


@pytest.mark.parametrize(
    ("env", "gpus", "processes", "on_gpu"),
    [
        ({}, 2, "2", True),
        ({}, 0, "1", False),
        ({"NGPU": "1"}, 2, "1", True),
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, 8, "3", True),
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, "1", False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 8, "1", False),
    ],
)
def test_processes_follow_the_visible_gpus(tree, env, gpus, processes, on_gpu):
    lines = "".join(f"echo 'GPU {i}: NVIDIA Something (UUID: GPU-{i})'\n" for i in range(gpus))
    tree.add_tool("nvidia-smi", lines or "echo 'No devices were found'; exit 6")
    torchrun = tree.launch(**env)[1]
    assert get_option(torchrun["argv"], "--nproc_per_node") == processes
    assert (torchrun["env"].get("PYTORCH_ALLOC_CONF") == "expandable_segments:True") is on_gpu


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"])
def test_what_the_user_set_is_kept(tree, name):
    env = tree.launch(CUDA_VISIBLE_DEVICES="0", **{name: "7"})[1]["env"]
    assert env[name] == "7"
    if "ALLOC" in name:
        assert [key for key in env if key.endswith("ALLOC_CONF")] == [name]


def test_threads_are_shared_out_among_the_processes(tree):
    cores = len(os.sched_getaffinity(0))
    assert tree.launch(NGPU="1")[1]["env"]["OMP_NUM_THREADS"] == str(cores)
    assert tree.launch(NGPU=str(4 * cores))[1]["env"]["OMP_NUM_THREADS"] == "1"


def test_several_hosts_by_address_or_by_rendezvous(tree):
    check, torchrun = tree.launch(
        NNODES="2", NGPU="4", MASTER_ADDR="node0", MASTER_PORT="123", NODE_RANK="1", RDZV_ID="job7"
    )
    argv = torchrun["argv"]
    given = [get_option(argv, f"--{name}") for name in ("nnodes", "node_rank", "master_addr", "master_port", "rdzv_id")]
    assert given == ["2", "1", "node0", "123", "job7"]
    assert check["env"]["WORLD_SIZE"] == "8"
    argv = tree.launch(NNODES="2", RDZV_ENDPOINT="node0:29400", RDZV_ID="job7")[1]["argv"]
    given = [get_option(argv, f"--rdzv_{name}") for name in ("backend", "endpoint", "id")]
    assert given == ["c10d", "node0:29400", "job7"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NGPU": "0"}, "NGPU=0"),
        ({"NGPU": "two"}, "NGPU=two"),
        ({"NNODES": "1:4"}, "NNODES=1:4"),
        ({"NNODES": "2"}, "MASTER_ADDR and NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "MASTER_ADDR and NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0", "MAX_RESTARTS": "1"}, "needs RDZV_ENDPOINT"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
        ({"LOG_RANK": "all"}, "LOG_RANK=all"),
    ],
)
def test_wrong_variables_are_named(tree, env, words):
    done = tree.run(**env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"BLOOMERY_INSTALL": "0"},
        {"SLURM_JOB_ID": "12"},
        {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0"},
    ],
)
def test_nothing_is_installed_where_that_is_off(tree, env):
    tree.write("pyproject.toml", '[project]\nname = "x"\ndependencies = ["no-such-package-here>=2", "pytest<1"]\n')
    done = tree.run(**env)
    assert done.returncode == 2
    assert "no-such-package-here>=2 (not installed)" in done.stderr
    assert f"pytest<1 (found {pytest.__version__})" in done.stderr
    assert "BLOOMERY_INSTALL" in done.stderr
    assert not (tree.repo / ".venv").exists()


def test_python_too_old_is_told(tree):
    tree.add_tool("python", "echo Python 2.7.18; exit 1")
    tree.add_tool("python3", "echo Python 3.9.2; exit 1")
    done = tree.run()
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed; found Python 3.9.2" in done.stderr


def build_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.exhaustive
def test_missing_packages_are_installed_once_into_venv_and_again_after_an_interruption(tree, tmp_path):
    build_wheel(tmp_path / "wheels", "smelter", "1.5")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    tree.write("pyproject.toml", '[project]\nname = "x"\ndependencies = ["smelter>=1.2"]\n')
    first = tree.run(**pip)
    assert first.returncode == 0, first.stderr
    assert "Setting up" in first.stderr
    assert list((tree.repo / ".venv").glob("lib/*/site-packages/smelter-1.5.dist-info"))
    assert tree.calls()[-1]["who"] == "torchrun"
    second = tree.run(BLOOMERY_INSTALL="0", **pip)
    assert second.returncode == 0, second.stderr
    assert "Setting up" not in second.stderr
    # What an interrupted install leaves is not trusted, whatever it looks like.
    (tree.repo / ".venv" / ".bloomery-incomplete").touch()
    assert tree.run(BLOOMERY_INSTALL="0", **pip).returncode == 2
    third = tree.run(**pip)
    assert third.returncode == 0, third.stderr
    assert "Setting up" in third.stderr
    tree.write("pyproject.toml", '[project]\nname = "x"\ndependencies = ["smelter>=2"]\n')
    fourth = tree.run(**pip)
    assert fourth.returncode == 2
    assert "installing into" in fourth.stderr


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("2.13.0+cpu", (2, 13)), ("2.11.0a0+git12", (2, 11)), ("1.10", (1, 10)), ("5", (5,)), ("0.17.0.post1", (0, 17))],
)
def test_parse_version_takes_the_release(text, parsed):
    assert check_environment.parse_version(text) == parsed


@pytest.mark.parametrize(
    ("requirement", "fine"),
    [
        ("torch>=2.11,<2.14", True),
        ("torch>=2.13.1", False),
        ("torch<2.13", False),
        ("torch==2.13", True),
        ("torch!=2.13.0", False),
        ("torch[extra] > 2.9", True),
        ("torch", True),
        ("no-such-package-here", False),
    ],
)
def test_find_problems_compares_versions_by_number(monkeypatch, requirement, fine):
    from importlib import metadata

    def version(name):
        if name != "torch":
            raise metadata.PackageNotFoundError(name)
        return "2.13.0+cpu"

    monkeypatch.setattr(metadata, "version", version)
    assert (check_environment.find_problems([requirement]) == []) is fine


def test_check_environment_understands_the_projects_own_requirements():
    requirements = check_environment.load_requirements(ROOT / "pyproject.toml", ["dev", "wandb"])
    assert len(requirements) > 10
    assert all(check_environment.parse_requirement(requirement)[0] for requirement in requirements)


def test_check_environment_refuses_an_old_python(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert check_environment.main([]) == 3
    assert "Python 3.11 or newer is needed" in capsys.readouterr().out


def test_check_environment_explains_itself_and_refuses_an_unknown_extra(capsys):
    assert check_environment.main(["--help"]) == 0
    assert "--extra NAME" in capsys.readouterr().out
    assert check_environment.main(["--extra", "everything"]) == 2
    assert "no extra 'everything'" in capsys.readouterr().err


def test_test_script_explains_itself():
    done = subprocess.run([f"{ROOT}/scripts/test.sh", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("Check the code and run the tests: scripts/test.sh")


@pytest.mark.parametrize("flag", ["--help", "--job.validate_only", "--training.setps=3"])
def test_real_answers_come_in_time_and_load_no_torch(flag):
    program = f"{ROOT}/run_train.sh"
    env = {**os.environ, "BLOOMERY_INSTALL": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([program, flag], capture_output=True, text=True, env=env, timeout=60)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (2 if "setps" in flag else 0), done.stderr
    assert "Traceback" not in done.stderr
    if "setps" in flag:
        assert "training.steps" in done.stdout + done.stderr
    # Of the processor: other work on the machine is not what is measured, and nothing here waits for anything else.
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 1.5
    traced = subprocess.run(
        [program, flag], capture_output=True, text=True, env={**env, "PYTHONPROFILEIMPORTTIME": "1"}
    )
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in traced.stderr.splitlines() if line.startswith("import time:")
    }
    assert "trainer.config.schema" in imported
    assert not {name for name in imported if name.split(".")[0] == "torch"}


@pytest.fixture
def real_torchrun(tree):
    """The made-up tree with the real torchrun."""
    shutil.rmtree(tree.repo / "torch")
    return tree


def test_error_of_a_hidden_rank_reaches_the_terminal(real_torchrun):
    real_torchrun.write(
        "trainer/train.py",
        textwrap.dedent(
            """
            import os, sys, time
            if "RANK" not in os.environ:
                sys.exit(0)  # the check of the settings
            if os.environ["RANK"] == "1":
                raise RuntimeError("rank one fell over")
            time.sleep(60)
            """
        ),
    )
    done = real_torchrun.run(NGPU="2")
    assert done.returncode != 0
    assert "RuntimeError: rank one fell over" in done.stderr
    assert "local_rank: 1" in done.stderr


def test_two_hosts_form_one_world(real_torchrun, unused_port):
    real_torchrun.write(
        "trainer/train.py",
        "import os\nprint('I am', os.environ.get('RANK'), 'of', os.environ['WORLD_SIZE'], flush=True)\n",
    )
    env = {"PATH": str(real_torchrun.bin), "HOME": str(real_torchrun.bin), "NNODES": "2", "NGPU": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    hosts = [
        subprocess.Popen(
            [str(real_torchrun.repo / "run_train.sh")],
            env={**env, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [host.communicate(timeout=120) for host in hosts]
    for rank, (stdout, stderr) in enumerate(outputs):
        assert f"I am {rank} of 2" in stdout, stderr


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
