import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

from scripts import benchmark
from scripts.benchmark import BenchmarkError, Case, Run

SETTINGS = {
    "model": {"name": "llama3", "flavor": "8B", "converters": ["float8"]},
    "training": {
        "local_batch_size": 2,
        "global_batch_size": -1,
        "seq_len": 8192,
        "mixed_precision_param": "bfloat16",
    },
    "parallelism": {
        "data_parallel_shard_degree": -1,
        "tensor_parallel_degree": 1,
        "enable_async_tensor_parallel": False,
    },
    "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
    "compile": {"enable": True},
}
# Stands in for torchrun: writes what a run writes, as its first override says.
FAKE_TORCHRUN = textwrap.dedent(
    """
    import json, os, subprocess, sys, time
    options = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
    folder, steps = options["--job.dump_folder"], int(options["--training.steps"])
    if "--explode" in sys.argv:
        print("the device caught fire")
        sys.exit(3)
    if "--hang" in sys.argv:
        # A worker in a session of its own that outlives its parent's polite end.
        worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(300)"],
                                  start_new_session=True)
        open(folder + "/pids", "w").write(f"{os.getpid()} {worker.pid}")
        time.sleep(300)
    cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    warm = os.path.exists(cache)
    os.makedirs(cache, exist_ok=True)
    with open(folder + "/metrics.jsonl", "w") as file:
        for step in range(1, steps + 1 - ("--short" in sys.argv)):
            file.write(json.dumps({
                "step": step, "loss": 10.0 / step, "time": time.time() + (5 if warm else 50),
                "tokens_per_second": 1.0 if step <= 2 else 1000.0 + step, "step_seconds": 1.0, "data_wait": 0.01,
                "mfu": 40.0, "mfu_full": 45.0, "memory_gib": 70.0 if step == 1 else 60.0}) + "\\n")
    open(folder + "/config.toml", "w").write(CONFIG)
    """
)


@pytest.fixture
def fake_torchrun(tmp_path, monkeypatch):
    """`python -m torch.distributed.run` of the benchmark becomes the program above."""
    import tomli_w

    package = tmp_path / "fake" / "torch" / "distributed"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "run.py").write_text(f"CONFIG = {tomli_w.dumps(SETTINGS)!r}\n{FAKE_TORCHRUN}")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path / "fake")
    # The overrides of these tests are for the program above, and no settings.
    monkeypatch.setattr(benchmark, "check_case", lambda case: None)
    versions = {"torch": "2.13.0", "cuda": None, "device": "NVIDIA H200"}
    monkeypatch.setattr(benchmark, "read_versions", lambda: versions)
    return tmp_path / "out"


def run_main(out, *words, overrides=(), steps=12):
    argv = ["--config", "c.toml", "--steps", str(steps), "--warmup", "2", "--out", str(out), *words, "--", *overrides]
    return benchmark.main(argv)


def test_main_measures_after_the_warm_up_and_stores_figures_and_table(fake_torchrun, capsys):
    assert run_main(fake_torchrun, "--nproc", "8", "--warm-start", overrides=["--model.flavor=8B"]) == 0
    stored = json.loads((fake_torchrun / "results.json").read_text())
    (result,) = stored["results"]
    assert result["steps_measured"] == 10
    assert result["tokens_per_second"] == pytest.approx(1007.5)
    assert (result["tokens_per_second_p10"], result["tokens_per_second_p90"]) == pytest.approx((1003.9, 1011.1))
    assert result["peak_memory_gib"] == 70.0
    assert 50 <= result["seconds_to_first_step_cold"] < 60
    assert 5 <= result["seconds_to_first_step_warm"] < 15
    assert (result["first_loss"], result["last_loss"]) == (10.0, pytest.approx(10 / 12))
    assert stored["versions"]["device"] == "NVIDIA H200"
    assert (result["settings"]["precision"], result["settings"]["degrees"]) == (
        "bfloat16+float8",
        {"data_parallel_shard_degree": -1},
    )
    table = (fake_torchrun / "results.md").read_text()
    assert table in capsys.readouterr().out
    row = table.splitlines()[-1]
    for part in ("| 8 |", "2 x 8192", "selective op", "**1,008** (1,004 to 1,011)", "40.0% / 45.0%", "70.0 GiB"):
        assert part in row
    assert {line.count("|") for line in table.splitlines()[2:]} == {11}
    assert "torch 2.13.0, device NVIDIA H200" in table


def test_main_shows_the_end_of_a_failed_run_and_goes_on(fake_torchrun, tmp_path, capsys):
    cases = tmp_path / "cases.json"
    cases.write_text(
        json.dumps(
            {
                "cases": [
                    {"config": "a.toml", "overrides": ["--explode"]},
                    {"config": "b.toml", "overrides": ["--short"]},
                    {"config": "c.toml", "name": "the good one"},
                ]
            }
        )
    )
    assert benchmark.main(["--cases", str(cases), "--steps", "4", "--warmup", "1", "--out", str(fake_torchrun)]) == 1
    shown = capsys.readouterr()
    assert "a --explode: ended with exit code 3" in shown.err
    assert "the device caught fire" in shown.err
    assert "b --short: no metrics up to step 4" in shown.err
    assert "the good one" in (fake_torchrun / "results.md").read_text()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_run_that_takes_too_long_is_ended_with_its_workers(fake_torchrun, capsys):
    assert run_main(fake_torchrun, "--timeout", "2", overrides=["--hang"]) == 1
    assert "took more than 2 s" in capsys.readouterr().err
    pids = [int(word) for word in (fake_torchrun / "case_1" / "run" / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.time() + 10
    while any(map(is_alive, pids)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_launch_gives_defaults_that_overrides_can_change(fake_torchrun, monkeypatch):
    commands = []

    def record(command, environment, output, timeout):
        commands.append((command, environment))
        return 1

    monkeypatch.setattr(benchmark, "_run_to_end", record)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    case = Case(config="c.toml", nproc=4, steps=20, warmup=5, overrides=["--checkpoint.enable=true"])
    with pytest.raises(BenchmarkError):
        benchmark.launch_run(case, steps=20, folder=fake_torchrun / "r", caches=fake_torchrun / "k", timeout=1.0)
    command, environment = commands[0]
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc_per_node=4" in command
    assert command.index("--checkpoint.enable=true") > command.index("--checkpoint.enable=false")
    assert command.index("--training.steps=20") > command.index("--checkpoint.enable=true")
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCHINDUCTOR_CACHE_DIR"].startswith(str(fake_torchrun))


def test_settings_that_cannot_run_are_told_before_anything_is_launched(tmp_path, monkeypatch, capsys):
    def launch(*args, **kwargs):
        raise AssertionError("nothing can be measured")

    monkeypatch.setattr(benchmark, "launch_run", launch)
    monkeypatch.setattr(benchmark, "read_versions", dict)
    argv = ["--config", str(benchmark.ROOT / "train_configs" / "debug_llama3.toml"), "--nproc", "2", "--steps", "4"]
    argv += ["--warmup", "1", "--out", str(tmp_path / "out")]
    assert benchmark.main([*argv, "--", "--training.setps=3", "--training.global_batch_size=7"]) == 1
    told = capsys.readouterr().err
    assert "Did you mean training.steps" in told
    assert "training.global_batch_size = 7" in told
    assert "Traceback" not in told


def test_load_cases_fills_in_from_the_command_line(tmp_path):
    path = tmp_path / "cases.toml"
    path.write_text(
        '[[cases]]\nname = "one"\nnproc = 2\noverrides = ["--a=1"]\n[[cases]]\nconfig = "other.toml"\nsteps = 99\n'
    )
    words = ["--cases", str(path), "--config", "c.toml", "--nproc", "8", "--steps", "30", "--", "--b=2"]
    cases = benchmark.load_cases(benchmark.parse_arguments(words))
    assert cases == [
        Case(config="c.toml", nproc=2, steps=30, warmup=10, name="one", overrides=["--b=2", "--a=1"]),
        Case(config="other.toml", nproc=8, steps=99, warmup=10, overrides=["--b=2"]),
    ]
    assert cases[1].title == "other --b=2"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no [[cases]]"),
        ('[[cases]]\nconfig = "a"\nstep = 5\n', "case 1: unknown key step"),
        ('[[cases]]\nname = "a"\n', "case 1: config is missing"),
        ('[[cases]]\nconfig = "a"\nsteps = 5\nwarmup = 5\n', "steps = 5 must be more than warmup = 5"),
        ("[[cases\n", "error: "),
        ('[[cases]]\nconfig = "a"\nnproc = 0\n', "nproc = 0 must be at least 1"),
    ],
)
def test_bad_case_lists_are_told(tmp_path, capsys, text, fault):
    path = tmp_path / "cases.toml"
    path.write_text(text)
    assert benchmark.main(["--cases", str(path), "--out", str(tmp_path / "out")]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (10, 1.4), (50, 3.0), (90, 4.6), (100, 5.0)])
def test_get_percentile_interpolates(percent, value):
    assert benchmark.get_percentile([1.0, 2.0, 3.0, 4.0, 5.0], percent) == pytest.approx(value)


def test_summarize_run_without_mfu_or_steady_steps():
    record = {
        "tokens_per_second": 5.0,
        "step_seconds": 1.0,
        "data_wait": 0.0,
        "memory_gib": 1.0,
        "loss": 1.0,
        "mfu": None,
    }
    run = Run(records=[record | {"step": step, "time": 10.0 + step} for step in (1, 2)], settings={}, launched=4.0)
    figures = benchmark.summarize_run(run, warmup=1)
    assert (figures["mfu"], figures["mfu_full"], figures["seconds_to_first_step_cold"]) == (None, None, 7.0)
    with pytest.raises(ValueError, match="no step"):
        benchmark.summarize_run(run, warmup=2)


def test_read_versions_names_torch_and_device():
    versions = benchmark.read_versions()
    assert versions["torch"]
    assert versions["device"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "driver" in versions
