"""Measure how fast a configuration trains: tokens/s per device and its spread, memory, time to the first step.

    python scripts/benchmark.py --config train_configs/llama3_8b.toml --nproc 8 --steps 50 --warmup 10 --warm-start \\
        -- --training.local_batch_size 2 --activation_checkpoint.mode none
    python scripts/benchmark.py --cases cases.toml

What follows `--` overrides settings. A list of cases is a TOML (or JSON) file; the command line gives what a case leaves out:

    [[cases]]
    name = "bf16, no recomputation"
    config = "train_configs/llama3_8b.toml"
    nproc = 8
    overrides = ["--activation_checkpoint.mode", "none"]

Each case runs through torchrun with `metrics.log_freq 1`, and without checkpoints, validation and TensorBoard unless its
overrides say otherwise; the first `warmup` steps are left out of the figures. The first run of a case finds empty compile
caches (the cold start); `--warm-start` runs it again for a few steps with the caches of the first. Time to the first step
counts from the launch of torchrun, and includes making token files of a data set that was never used. The results go to `<out>/results.json` and `<out>/results.md`, after each case.

Exit code 0: all cases ran. 1: some failed; the end of their output is shown and the others are run all the same.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.components.metric_writers import METRICS_FILE, read_metrics  # noqa: E402 the root is on the path from here

DEFAULT_OVERRIDES = (
    "--checkpoint.enable=false",
    "--validation.enable=false",
    "--metrics.enable_tensorboard=false",
    "--metrics.log_freq=1",
)
WARM_START_STEPS = 3
TAIL_LINES = 30
# Runs in a process of its own: this one must not open a context on the device that is measured.
VERSIONS_PROGRAM = """
import importlib.metadata, json, platform, torch
try:
    torchao = importlib.metadata.version("torchao")
except importlib.metadata.PackageNotFoundError:
    torchao = None
cuda = torch.cuda.is_available()
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torchao": torchao,
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine(),
}))
"""


@dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    config: str
    nproc: int
    steps: int
    warmup: int
    name: str = ""
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ValueError(f"{self.title}: nproc = {self.nproc} must be at least 1")
        if self.warmup < 1 or self.steps <= self.warmup:
            raise ValueError(f"{self.title}: steps = {self.steps} must be more than warmup = {self.warmup}, at least 1")

    @property
    def title(self) -> str:
        """The name, or the configuration and what is overridden."""
        return self.name or " ".join([Path(self.config).stem, *self.overrides])


class BenchmarkError(RuntimeError):
    """A run failed, ran too long or wrote no metrics."""


@dataclass(frozen=True)
class Run:
    """What one run left: its logged steps, its settings, and the unix time of its launch in seconds."""

    records: list[dict[str, Any]]
    settings: dict[str, Any]
    launched: float

    @property
    def seconds_to_first_step(self) -> float:
        """From the launch to the end of the first step."""
        return self.records[0]["time"] - self.launched


def launch_run(case: Case, *, steps: int, folder: Path, caches: Path, timeout: float) -> Run:
    """Train `steps` steps of a case in `folder`, and return what it logged.

    Args:
        case: what to run.
        steps: optimizer steps.
        folder: `job.dump_folder`; the output is kept there as `output.log`.
        caches: compile caches.
        timeout: seconds after which the run and all its processes are ended.

    Raises:
        BenchmarkError: with the end of the output.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={case.nproc}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--local_addr=localhost", "-m", "trainer.train"]
    command += [*_get_settings(case), f"--training.steps={steps}", f"--job.dump_folder={folder}"]
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // case.nproc, 1)),
        **os.environ,
        "PYTHONPATH": _get_python_path(),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    log = folder / "output.log"
    launched = time.time()
    with open(log, "w") as output:
        code = _run_to_end(command, environment, output, timeout)
    if code != 0:
        why = f"took more than {timeout:.0f} s" if code is None else f"ended with exit code {code}"
        raise BenchmarkError(f"{case.title}: {why}. The end of {log}:\n{_read_tail(log)}")
    records = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    if not records or records[-1]["step"] != steps:
        raise BenchmarkError(f"{case.title}: no metrics up to step {steps} in {folder}. Its output:\n{_read_tail(log)}")
    with open(folder / "config.toml", "rb") as file:
        settings = tomllib.load(file)
    return Run(records=records, settings=settings, launched=launched)


def check_case(case: Case) -> None:
    """Check the settings of a case, in half a second and without a device. Raises BenchmarkError, with all that is wrong."""
    command = [sys.executable, "-m", "trainer.train", *_get_settings(case), f"--training.steps={case.steps}"]
    environment = {**os.environ, "PYTHONPATH": _get_python_path(), "WORLD_SIZE": str(case.nproc)}
    done = subprocess.run([*command, "--job.validate_only"], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{case.title}: {done.stderr.strip()}")


def _get_settings(case: Case) -> list[str]:
    return ["--job.config_file", case.config, *DEFAULT_OVERRIDES, *case.overrides]


def _get_python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _run_to_end(command: list[str], environment: dict[str, str], output: Any, timeout: float) -> int | None:
    """Exit code of a command; None where it was ended, with all that it started, for taking too long."""
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait(timeout)
    except BaseException as error:
        # An interrupt too must not leave workers on the devices. torchrun ends its own, by force after 30 s; they have
        # sessions of their own, so whoever is left is found by descent.
        family = [process.pid, *_find_descendants(process.pid)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(45)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def _find_descendants(pid: int) -> list[int]:
    """Children of a process and theirs, as far as /proc tells."""
    found = []
    for tasks in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                found += [child, *_find_descendants(child)]
    return found


def _read_tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])


def summarize_run(run: Run, *, warmup: int) -> dict[str, Any]:
    """Reduce the steps after the first `warmup` to the figures of a results table.

    Raises:
        ValueError: no step is left.
    """
    steady = [record for record in run.records if record["step"] > warmup]
    if not steady:
        raise ValueError(f"no step was logged after the warm-up of {warmup} steps")
    speeds = sorted(record["tokens_per_second"] for record in steady)
    mfus = {key: [r[key] for r in steady if r.get(key) is not None] for key in ("mfu", "mfu_full")}
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_p10": get_percentile(speeds, 10),
        "tokens_per_second_p90": get_percentile(speeds, 90),
        "steps_measured": len(speeds),
        **{key: statistics.median(values) if values else None for key, values in mfus.items()},
        "step_seconds": statistics.median(record["step_seconds"] for record in steady),
        "data_wait": statistics.median(record["data_wait"] for record in steady),
        "peak_memory_gib": max(record["memory_gib"] for record in run.records),
        "first_loss": run.records[0]["loss"],
        "last_loss": run.records[-1]["loss"],
        "seconds_to_first_step_cold": run.seconds_to_first_step,
        "seconds_to_first_step_warm": None,
    }


def get_percentile(ordered: list[float], percent: float) -> float:
    """Return the value below which `percent` of the ordered values lie, interpolated between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def describe_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Pick what a figure means nothing without from the resolved configuration of a run."""
    training, parallelism = settings["training"], settings["parallelism"]
    ac, model = settings["activation_checkpoint"], settings["model"]
    selective = f"selective {ac['selective_ac_option']}"
    degrees = {key: value for key, value in parallelism.items() if key.endswith("_degree") and value != 1}
    return {
        "model": f"{model['name']} {model['flavor']}",
        "local_batch_size": training["local_batch_size"],
        "global_batch_size": training["global_batch_size"],
        "seq_len": training["seq_len"],
        "activation_checkpoint": selective if ac["mode"] == "selective" else ac["mode"],
        "precision": "+".join([training["mixed_precision_param"], *model.get("converters", [])]),
        "compile": settings["compile"]["enable"],
        "degrees": degrees,
    }


def measure_case(case: Case, *, out: Path, timeout: float, warm_start: bool) -> dict[str, Any]:
    """Run a case, once more where the warm start is wanted, and return its result. Raises BenchmarkError."""
    caches = out / "compile_cache"
    run = launch_run(case, steps=case.steps, folder=out / "run", caches=caches, timeout=timeout)
    figures = summarize_run(run, warmup=case.warmup)
    if warm_start:
        again = launch_run(case, steps=WARM_START_STEPS, folder=out / "warm", caches=caches, timeout=timeout)
        figures["seconds_to_first_step_warm"] = again.seconds_to_first_step
    return {"case": asdict(case) | {"title": case.title}, "settings": describe_settings(run.settings), **figures}


def read_versions() -> dict[str, Any]:
    """Return what the figures depend on outside this repository: versions, device and driver."""
    done = subprocess.run([sys.executable, "-c", VERSIONS_PROGRAM], capture_output=True, text=True, check=True)
    versions = json.loads(done.stdout.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return versions | {"driver": driver[0] if driver else None, "commit": commit.stdout.strip() or None}


def format_table(results: list[dict[str, Any]], versions: dict[str, Any]) -> str:
    """Write results as a Markdown table, with the conditions above it."""
    conditions = ", ".join(f"{key} {value}" for key, value in versions.items() if value is not None)
    head = (
        "case | devices | batch x seq | recomputation | precision | compile | tokens/s per device (p10 to p90) | "
        "MFU causal / full | peak memory | first step cold / warm"
    )
    lines = [conditions, "", f"| {head} |", "|-" * (head.count("|") + 1) + "|"]
    for result in results:
        case, settings = result["case"], result["settings"]
        cells = (
            case["title"],
            case["nproc"],
            f"{settings['local_batch_size']} x {settings['seq_len']}",
            settings["activation_checkpoint"],
            settings["precision"],
            "yes" if settings["compile"] else "no",
            f"**{result['tokens_per_second']:,.0f}** "
            f"({result['tokens_per_second_p10']:,.0f} to {result['tokens_per_second_p90']:,.0f})",
            " / ".join(_format_number(result[key], "%") for key in ("mfu", "mfu_full")),
            f"{result['peak_memory_gib']:.1f} GiB",
            " / ".join(_format_number(result[f"seconds_to_first_step_{key}"], " s") for key in ("cold", "warm")),
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _format_number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f}{unit}"


def load_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases of the list, or the one of the command line.

    Raises:
        ValueError: the list has no case, or one has an unknown or missing key.
    """
    common = {"nproc": arguments.nproc, "steps": arguments.steps, "warmup": arguments.warmup}
    if arguments.cases is None:
        return [Case(config=arguments.config, overrides=arguments.overrides, **common)]
    text = Path(arguments.cases).read_text()
    entries = (json.loads(text) if arguments.cases.endswith(".json") else tomllib.loads(text)).get("cases", [])
    if not entries:
        raise ValueError(f"{arguments.cases}: no [[cases]]")
    if arguments.config:
        common["config"] = arguments.config
    cases = []
    for number, entry in enumerate(entries, start=1):
        unknown = entry.keys() - Case.__dataclass_fields__.keys()
        if unknown or "config" not in common | entry:
            wrong = f"unknown key {', '.join(sorted(unknown))}" if unknown else "config is missing"
            allowed = ", ".join(Case.__dataclass_fields__)
            raise ValueError(f"{arguments.cases}: case {number}: {wrong}. A case has: {allowed}")
        overrides = [*arguments.overrides, *entry.get("overrides", [])]
        cases.append(Case(**{**common, **entry, "overrides": overrides}))
    return cases


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; what follows `--` becomes `overrides`."""
    own, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="TOML file to run")
    parser.add_argument("--cases", help="TOML or JSON file with a list of cases")
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a device (default 1)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a run (default 50)")
    parser.add_argument("--warmup", type=int, default=10, help="first steps that are not measured (default 10)")
    parser.add_argument("--warm-start", action="store_true", help="also time the first step with warm compile caches")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take (default 1800)")
    parser.add_argument("--out", default=None, help="folder for the results (default outputs/benchmark/<time>)")
    arguments = parser.parse_args(own)
    if not arguments.config and not arguments.cases:
        parser.error("give --config or --cases")
    arguments.overrides = overrides
    arguments.out = Path(arguments.out or f"outputs/benchmark/{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    return arguments


def measure_all(cases: list[Case], arguments: argparse.Namespace, versions: dict[str, Any]) -> Iterator[str]:
    """Measure each case, store what there is after each, and yield the failures."""
    results: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {case.title}: {case.steps} steps on {case.nproc} device(s)", flush=True)
        folder = arguments.out / f"case_{number}"
        try:
            check_case(case)
            result = measure_case(case, out=folder, timeout=arguments.timeout, warm_start=arguments.warm_start)
        except BenchmarkError as error:
            yield str(error)
            continue
        results.append(result)
        stored = {"versions": versions, "results": results}
        (arguments.out / "results.json").write_text(json.dumps(stored, indent=2) + "\n")
        (arguments.out / "results.md").write_text(format_table(results, versions))
        speed, memory = result["tokens_per_second"], result["peak_memory_gib"]
        print(f"    {speed:,.0f} tokens/s per device, {memory:.1f} GiB", flush=True)


def main(argv: list[str]) -> int:
    """See the top of the file. Returns the exit code."""
    arguments = parse_arguments(argv)
    try:
        cases = load_cases(arguments)
        arguments.out.mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failures = []
    for failure in measure_all(cases, arguments, read_versions()):
        print(f"FAILED {failure}", file=sys.stderr, flush=True)
        failures.append(failure)
    table = arguments.out / "results.md"
    if table.exists():
        print(f"\n{table.read_text()}\nStored in {arguments.out}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
